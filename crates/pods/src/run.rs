//! RunPodSandbox.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use stave_cri_proto::v1 as cri;
use stave_spec::SeLinuxLabels;
use stave_supervisor_proto::v1::{self as proto, packet, request};
use stave_sys::Placeholder;
use tokio::task::JoinHandle;

use crate::error::{Code, Error, Result};
use crate::events::PodEvents;
use crate::files;
use crate::host_ports::{check_once, in_use, port_mappings};
use crate::id::new_id;
use crate::jobs::Stage;
use crate::net_sysctls;
use crate::network::{Attach, Prepared};
use crate::pod::Pod;
use crate::pods::{Inner, Pods, blocking, now};
use crate::ready::ReadySupervisor;
use crate::record::{PodRecord, PodState, namespaces, pod_key};
use crate::runtimes::Handler;
use crate::scope::pod_cgroup_error;
use crate::shm;
use crate::supervisor::{Supervisor, unexpected};

impl Pods {
    /// Makes a pod and returns its id. A repeat of the same request joins the running one, or gets the pod
    /// that it made; another request with the same metadata is refused.
    pub async fn run(&self, config: cri::PodSandboxConfig, runtime_handler: String) -> Result<String> {
        stave_spec::validate_pod(&config)?;
        shm::size(&config)?;
        let runtimes = &self.0.settings.runtimes;
        let Some(handler) = runtimes.find(&runtime_handler) else {
            let known: Vec<&str> = runtimes.all().iter().map(|handler| handler.name.as_str()).collect();
            return Err(Error::new(
                Code::NotFound,
                format!("runtime_handler {runtime_handler:?}: unknown; known are {known:?}"),
            ));
        };
        let handler = handler.clone();
        if let Some(oci) = &handler.oci {
            oci.check()?;
            refuse_namespaces(&handler, &config)?;
        }
        if stave_spec::user_namespace(&config).is_some() && !self.0.settings.user_namespaces {
            return Err(Error::new(
                Code::FailedPrecondition,
                "config.linux.security_context.namespace_options.userns_options: value \"POD\": this host lacks user \
                 namespaces or idmapped mounts: see stave check",
            ));
        }
        let key = pod_key(&config);
        let inner = Arc::clone(&self.0);
        let content = (config.clone(), runtime_handler.clone());
        let job = self.0.run_jobs.run(key.clone(), content, |stage| async move {
            inner.run_pod(config, runtime_handler, handler, &stage).await
        });
        job.await.unwrap_or_else(|()| Err(taken(&key, "being made, from another configuration")))
    }
}

/// Namespaces that an OCI runtime does not say it can join.
fn refuse_namespaces(handler: &Handler, config: &cri::PodSandboxConfig) -> Result<()> {
    let user = "config.linux.security_context.namespace_options.userns_options.mode POD";
    let time = format!("config.annotations[{:?}]", stave_spec::TIME_OFFSETS);
    let wanted = [
        (stave_spec::user_namespace(config).is_some(), "user", user),
        (stave_spec::time_namespace(config)?.is_some(), "time", &time),
    ];
    let refused = wanted.into_iter().find(|(wanted, kind, _)| *wanted && !handler.joins(kind));
    let Some((_, kind, field)) = refused else { return Ok(()) };
    let program = handler.oci.as_ref().map(|oci| oci.program.display().to_string()).unwrap_or_default();
    let message = format!(
        "{field}: runtime handler {:?} offers no {kind} namespaces: `{program} features` does not name them",
        handler.name
    );
    Err(Error::new(Code::FailedPrecondition, message))
}

fn taken(key: &str, by: &str) -> Error {
    Error::new(Code::AlreadyExists, format!("config.metadata: {key} is {by}"))
}

impl Inner {
    async fn run_pod(
        self: &Arc<Self>,
        config: cri::PodSandboxConfig,
        runtime_handler: String,
        handler: Handler,
        stage: &Stage,
    ) -> Result<String> {
        let key = pod_key(&config);
        let existing = self.pods_read().with_key(&key);
        // What a failed RunPodSandbox, or a daemon that died in one, could not undo must not hold the name: nobody
        // knows its id. This job is the only one of that name, so nobody is making it.
        let unfinished = existing.as_ref().filter(|pod| pod.state() == PodState::Creating);
        if let Some(unfinished) = unfinished {
            self.remove_pod(unfinished).await?;
        } else if let Some(existing) = existing {
            let record = existing.record();
            // A retry whose first answer was lost.
            if record.state == PodState::Ready
                && record.config == config
                && record.runtime_handler == runtime_handler
            {
                return Ok(record.id);
            }
            return Err(taken(&key, &format!("the name of pod {}; remove that one first", record.id)));
        }
        let ports = port_mappings(&config)?;
        let host_network = namespaces(&config).network() == cri::NamespaceMode::Node;
        let has_host_ports = !host_network && self.settings.network.has_host_ports();
        if has_host_ports {
            check_once(&ports)?;
        }
        if !host_network {
            self.settings.network.check(&config).await?;
        }
        let selinux_level = self.new_selinux_level()?;
        self.pod_labels(&config, &selinux_level)?;
        let id = new_id()?;
        let parent = config.linux.as_ref().map_or("", |linux| linux.cgroup_parent.as_str());
        let cgroup = self.settings.cgroups.pod_path(parent, &id).map_err(|e| {
            Error::new(Code::InvalidArgument, format!("config.linux.cgroup_parent {parent:?}: {e}"))
        })?;
        let pod = Pod::new(PodRecord {
            id: id.clone(),
            // Before it is made, so that a daemon that finds this record takes nobody else's away.
            cgroup_is_foreign: self.is_foreign(&cgroup),
            cgroup,
            config,
            runtime_handler,
            created_at: now(),
            state: PodState::Creating,
            ips: Vec::new(),
            torn_down: false,
            selinux_level,
            overhead: None,
            resources: None,
            oci: handler.oci,
            pids_limit: handler.pids_limit,
        });
        // First the record: whatever is made from here on is found again.
        self.save_pod(&pod)?;
        stage.set("looking for host ports of others");
        let in_use = {
            // In one piece: of two that are started at once, one gets it.
            let mut pods = self.pods_write();
            let in_use = if has_host_ports { in_use(pods.values(), &ports) } else { None };
            pods.insert(Arc::clone(&pod));
            in_use
        };
        let made = match in_use {
            None => self.set_up(&pod, &ports, stage).await,
            Some(error) => Err(error),
        };
        match made {
            Ok(()) => Ok(id),
            Err(mut error) => {
                let (at, _) = stage.get();
                stage.set("undoing a failed start");
                if let Err(more) = self.remove_pod(&pod).await {
                    tracing::error!(pod = id, error = %more, "undoing a failed RunPodSandbox");
                }
                error.message = format!("{at}: {}", error.message);
                Err(error)
            }
        }
    }

    async fn set_up(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        ports: &[stave_network::PortMapping],
        stage: &Stage,
    ) -> Result<()> {
        let record = pod.record();
        let host_ipc = record.namespaces().ipc() == cri::NamespaceMode::Node;
        // "" is for the host's network, where there is no UTS namespace of the pod's own; a pod with
        // a network of its own and no hostname keeps the node's name too, as in other runtimes.
        let hostname = match record.config.hostname.as_str() {
            "" => files::node_hostname(),
            name => name.to_owned(),
        };

        stage.set("starting the pod's scope");
        let _starting = self.pool.starting();
        let started = std::time::Instant::now();
        let labels = self.pod_labels(&record.config, &record.selinux_level)?;
        let label = labels.as_ref().map(|labels| labels.mount.clone());
        let shm = if host_ipc { None } else { Some(shm::size(&record.config)?) };
        // Beside the rest: they are for the first container.
        let files = tokio::spawn(blocking({
            let (dir, config, name) = (self.pod_dir(&record.id), record.config.clone(), hostname.clone());
            move || files::make(&dir, &config, &name, shm, label.as_deref())
        }));
        let labels = labels.unwrap_or(SeLinuxLabels { process: String::new(), mount: String::new() });
        let connected = self.connect(pod, &record, hostname, labels, ports, stage).await;
        // All that was begun has ended when this returns: who undoes a failure must not meet what goes on.
        let made = files.await.unwrap_or_else(|e| Err(Error::internal("task", e)));
        let (supervisor, ips) = connected?;
        made.inspect_err(|_| stage.set("making the pod's files"))?;
        self.save_pod_then(pod, |record| {
            record.ips.clone_from(&ips);
            record.state = PodState::Ready;
        })?;
        // It may have died since; its closed() came before the pod was ready, and was ignored.
        if !supervisor.is_open() {
            return Err(Error::new(Code::Internal, "the pod's supervisor has ended"));
        }
        tracing::info!(pod = record.id, name = record.key(), elapsed = ?started.elapsed(), "pod is ready");
        Ok(())
    }

    /// Starts the pod's supervisor, and puts the pod on the network. Gives its addresses, too.
    async fn connect(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        record: &PodRecord,
        hostname: String,
        labels: SeLinuxLabels,
        ports: &[stave_network::PortMapping],
        stage: &Stage,
    ) -> Result<(Arc<Supervisor>, Vec<String>)> {
        let host_network = record.host_network();
        let host_ipc = record.namespaces().ipc() == cri::NamespaceMode::Node;
        let started = std::time::Instant::now();
        let placeholder = self.start_scope(record).await?;
        if placeholder.is_some() {
            tracing::debug!(pod = record.id, elapsed = ?started.elapsed(), "the scope is up");
        }

        stage.set("starting the supervisor");
        let mut ready = self.pool.take(record, self.settings.runtimes.find("").map(|handler| &handler.name));
        let mut sysctls = stave_spec::default_sysctls(&record.config);
        if ready.is_some() {
            // Its namespaces have them.
            sysctls
                .retain(|key, value| !stave_spec::NETWORK_DEFAULTS.contains(&(key.as_str(), value.as_str())));
        }
        // Plugins find the pod's sysctls written, and may write others over them.
        let plugins_wait = sysctls.keys().any(|key| key.starts_with("net."));
        let prepared = ready
            .as_mut()
            .and_then(|ready| ready.network.take())
            .filter(|prepared| !(plugins_wait && matches!(prepared, Prepared::Namespace(_))));
        // Those of the interface wait for it, unless it is there already.
        let mut of_interface = Vec::new();
        if !matches!(prepared, Some(Prepared::Link(_))) {
            sysctls.retain(|key, value| {
                let waits = net_sysctls::is_of_interface(key);
                if waits {
                    of_interface.push((key.clone(), value.clone()));
                }
                !waits
            });
        }
        let call = proto::SetUpPod {
            new_network_namespace: !host_network,
            new_ipc_namespace: !host_ipc,
            new_uts_namespace: !host_network,
            hostname: if host_network { String::new() } else { hostname },
            sysctls: sysctls.into_iter().collect(),
            // Made for the first container that asks for it: what a container asks for decides.
            pod_pid_namespace: false,
            selinux_process_label: labels.process,
            selinux_file_label: labels.mount,
            user_namespace: stave_spec::user_namespace(&record.config),
            time_namespace: stave_spec::time_namespace(&record.config)?,
        };
        let mut completed = None;
        let supervise = self.supervise(pod, record, ready, call, placeholder, &mut completed);
        // What was made in advance needs no supervisor to become the pod's.
        let attach = async {
            let prepared = prepared?;
            Some(self.settings.network.attach_prepared(&record.id, &record.config, prepared, ports).await)
        };
        let (supervised, attached) = tokio::join!(supervise, attach);
        let completed = match completed {
            Some(task) => task.await.unwrap_or_else(|e| Err(Error::internal("task", e))),
            None => Ok(()),
        };
        let (supervisor, netns) = supervised?;
        completed?;
        let for_sysctls = match of_interface.is_empty() {
            true => None,
            false => Some(netns.try_clone().map_err(|e| Error::internal("network namespace", e))?),
        };
        let ips = match attached {
            Some(attached) => {
                stage.set("attaching to the network");
                attached?
            }
            None if host_network => Vec::new(),
            None => {
                stage.set("attaching to the network");
                self.settings
                    .network
                    .attach(Attach { id: &record.id, config: &record.config, netns, ports })
                    .await?
            }
        };
        if let Some(netns) = for_sysctls {
            net_sysctls::write(netns, of_interface).await?;
        }
        Ok((supervisor, ips))
    }

    /// Brings the pod's supervisor up, in its namespaces. Gives the network namespace, too; `completed` is to be
    /// awaited, whatever this gives.
    async fn supervise(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        record: &PodRecord,
        ready: Option<ReadySupervisor>,
        set_up: proto::SetUpPod,
        placeholder: Option<Placeholder>,
        completed: &mut Option<JoinHandle<Result<()>>>,
    ) -> Result<(Arc<Supervisor>, OwnedFd)> {
        let started = std::time::Instant::now();
        let (inner, cgroup, id) = (Arc::clone(self), record.cgroup.clone(), record.id.clone());
        let by_daemon = ready.is_none();
        let parent = record.cgroup_parent().to_owned();
        let launch = blocking(move || {
            files::make_dirs(&inner.pod_dir(&id))?;
            let cgroups = &inner.settings.cgroups;
            cgroups.create_for_supervisor(&cgroup).map_err(|e| pod_cgroup_error(&parent, &e))?;
            let launch = inner.prepare_launch(&inner.pod_dir(&id), &cgroup)?;
            if by_daemon {
                inner.launch(&id, &launch)?;
            }
            Ok(launch)
        })
        .await?;
        if let Some(ready) = ready {
            ready.become_supervisor(&record.id, &launch).await?;
        }
        // Beside the rest: it is for the first container.
        *completed = Some(tokio::spawn({
            let (inner, record) = (Arc::clone(self), record.clone());
            async move { inner.complete_cgroup(&record, placeholder).await }
        }));
        let socket = launch.dir.join(files::SOCKET);
        // Its own copies only: its end must be seen.
        drop(launch);
        let events = PodEvents::new(self, &record.id);
        let call = request::Call::SetUpPod(set_up);
        let (supervisor, reply) = Supervisor::connect_and_call(&socket, events, call).await?;
        pod.set_supervisor(Some(Arc::clone(&supervisor)));
        tracing::debug!(pod = record.id, elapsed = ?started.elapsed(), by_daemon, "supervisor is up");
        match reply? {
            (packet::Body::PodReady(_), mut fds) if fds.len() == 1 => Ok((supervisor, fds.remove(0))),
            (other, _) => Err(unexpected("PodReady with one descriptor", &other)),
        }
    }

    /// A cgroup that is there before any pod of ours: the kubelet's. One that a pod of ours made, and shares
    /// with another, goes with the last of them.
    fn is_foreign(&self, cgroup: &str) -> bool {
        let pods = self.pods_read();
        let mut sharing = pods.in_cgroup(cgroup).peekable();
        if sharing.peek().is_some() {
            return sharing.all(|pod| pod.with(|record| record.cgroup_is_foreign));
        }
        drop(sharing);
        drop(pods);
        self.settings.cgroups.exists(cgroup)
    }
}
