//! CreateContainer.

use std::fs;
use std::sync::Arc;

use prost::Message as _;
use stave_cri_proto::v1 as cri;
use stave_images::Image;
use stave_spec::{ContainerFacts, ContainerSpec, ImageDefaults, LiveHost, PodFacts};
use stave_state::Durability;
use stave_supervisor_proto::v1::{self as proto, packet, request};

use crate::error::{Code, Error, Result};
use crate::files;
use crate::id::new_id;
use crate::image_volumes;
use crate::jobs::Stage;
use crate::oci_bundle;
use crate::pod::{Container, Pod};
use crate::pods::{Inner, Pods, blocking, now, remove_tree};
use crate::record::{ContainerRecord, ContainerState, PodRecord, PodState, container_key};
use crate::runtimes::OciRuntime;
use crate::selinux;
use crate::stop::Gathered;
use crate::supervisor::{Supervisor, unexpected};
use crate::update::cgroup_error;

/// The plan in a container's bundle: what a later exec takes user, environment and capabilities from.
pub(crate) const PLAN: &str = "plan.pb";
/// The OCI specification in a container's bundle.
pub(crate) const CONFIG: &str = "config.json";

impl Pods {
    /// Makes a container up to its execve and returns its id. A repeat of the same request joins the
    /// running one, or gets the container that it made.
    pub async fn create(&self, pod_id: &str, config: cri::ContainerConfig) -> Result<String> {
        let name = config.metadata.as_ref().map_or("", |metadata| metadata.name.as_str());
        if name.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "config.metadata.name \"\": is required"));
        }
        let pod = self.0.pod(pod_id).ok_or_else(|| Error::pod_not_found(pod_id))?;
        if pod.state() != PodState::Ready {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("pod_sandbox_id {pod_id:?}: the pod is not ready"),
            ));
        }
        let key = container_key(&pod.with(|record| record.id.clone()), &config);
        let inner = Arc::clone(&self.0);
        let job = self.0.create_jobs.run(key.clone(), config.clone(), |stage| async move {
            Box::pin(inner.create_container(&pod, config, &stage)).await
        });
        job.await.unwrap_or_else(|()| {
            Err(Error::new(
                Code::AlreadyExists,
                format!("config.metadata: {key} is being made, from another configuration"),
            ))
        })
    }
}

impl Inner {
    async fn create_container(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        config: cri::ContainerConfig,
        stage: &Stage,
    ) -> Result<String> {
        let pod_id = pod.with(|record| record.id.clone());
        // A stop of the pod waits for this, so that it leaves nothing behind.
        let _making = pod.making.read().await;
        if pod.state() != PodState::Ready {
            return Err(Error::new(
                Code::FailedPrecondition,
                format!("pod_sandbox_id {pod_id:?}: the pod is not ready"),
            ));
        }
        let key = container_key(&pod_id, &config);
        for existing in self.containers_of(&pod_id).into_iter().filter(|c| c.with(|r| r.key() == key)) {
            let record = existing.record();
            // What a failed CreateContainer could not undo must not hold the name: nobody knows its id. This
            // job is the only one of that name, so nobody is making it.
            if !existing.is_visible() {
                self.remove_container(&existing).await?;
                continue;
            }
            if record.state == ContainerState::Created && record.config == config {
                return Ok(record.id);
            }
            return Err(Error::new(
                Code::AlreadyExists,
                format!(
                    "config.metadata: {key} is the name of container {}; remove that one first",
                    record.id
                ),
            ));
        }
        let wanted = config.image.as_ref().map_or("", |image| image.image.as_str());
        if wanted.is_empty() {
            return Err(Error::new(Code::InvalidArgument, "config.image.image \"\": is required"));
        }
        let image = self.settings.images.find(wanted).ok_or_else(|| {
            Error::new(Code::NotFound, format!("config.image.image {wanted:?}: no such image; pull it first"))
        })?;
        let id = new_id()?;
        let started = std::time::Instant::now();
        // Before the first look at its layers: they stay, whoever removes the image now.
        let mut record = new_record(&id, &pod_id, config, &image);
        record.image_volumes = image_volumes::find(&self.settings.images, &record.config);
        let held = self.settings.images.hold_chain(&id, &record.layers());
        held.map_err(|e| Error::internal("image layers", e))?;
        let container = Container::new(record, false);
        self.containers_write().insert(id.clone(), Arc::clone(&container));
        match Box::pin(self.make(pod, &container, &image, stage)).await {
            Ok(()) => {
                tracing::info!(container = id, name = key, elapsed = ?started.elapsed(), "container is created");
                Ok(id)
            }
            Err(mut error) => {
                let (at, _) = stage.get();
                stage.set("undoing a failed create");
                if let Err(more) = self.remove_container(&container).await {
                    tracing::error!(container = id, error = %more, "undoing a failed CreateContainer");
                }
                // The kubelet looks for that word at the start.
                if !error.message.starts_with(image_volumes::FAILED) {
                    error.message = format!("{at}: {}", error.message);
                }
                Err(error)
            }
        }
    }

    async fn make(
        self: &Arc<Self>,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
        image: &Arc<Image>,
        stage: &Stage,
    ) -> Result<()> {
        stage.set("checking the request");
        let pod_record = pod.record();
        let record = container.record();
        let (id, pod_id) = (record.id.as_str(), record.pod_id.as_str());
        let supervisor = self.supervisor_of(pod_id)?;
        let mut spec = {
            let (inner, pod, record) = (Arc::clone(self), pod_record.clone(), record.clone());
            let image = Arc::clone(image);
            unless_ended(&supervisor, blocking(move || inner.specify(&pod, &record, &image))).await?
        };
        let target = self.pid_target(pod_id, &record.config)?;
        let mut limits = cgroup_resources(&spec.resources);
        limits.pids_limit = limits.pids_limit.or(pod_record.pids_limit);
        if let Some(class) = &spec.block_io {
            limits.block_io = self.settings.block_io.find(&class.field, &class.name)?;
        }

        if let Some(oci) = &pod_record.oci {
            oci.check()?;
            self.refuse_mounts(oci, &record.config, oci_bundle::in_user_namespace(&spec.oci))?;
        }
        stage.set("compiling the seccomp profile");
        Box::pin(self.set_seccomp(&mut spec)).await?;

        unless_ended(&supervisor, selinux::relabel(&spec.relabel, stage)).await?;

        stage.set("making cgroup and directories");
        let (inner, pod_cgroup, container_id) = (Arc::clone(self), pod_record.cgroup.clone(), id.to_owned());
        let (bundle, data) = (self.bundle_dir(pod_id, id), self.data_dir(id));
        let mut plan = std::mem::take(&mut spec.plan);
        if let Some(target) = target {
            plan.pid_target = target.with(|record| record.id.clone());
        }
        if let Some(root) = plan.root.as_mut().filter(|_| self.settings.overlay_volatile) {
            root.options.push("volatile".to_owned());
        }
        let oci = std::mem::take(&mut spec.oci);
        let (uid, gid) = files::root_of(&pod_record.config);
        let runtime = match &pod_record.oci {
            None => None,
            Some(runtime) => {
                Some(oci_bundle::runtime(runtime, pod_id, &bundle, &oci, &plan, &self.rights())?)
            }
        };
        let with_runtime = runtime.is_some();
        let plan = blocking(move || {
            // The parent is 0700; these two are the container's root directory and must be passable.
            for dir in [data.clone(), data.join("upper"), data.join("work"), bundle.clone()] {
                fs::create_dir(&dir)
                    .map_err(|e| Error::internal(format_args!("mkdir {}", dir.display()), e))?;
            }
            // The root directory of the container.
            if uid != 0 {
                std::os::unix::fs::chown(data.join("upper"), Some(uid), Some(gid))
                    .map_err(|e| Error::internal(format_args!("chown in {}", data.display()), e))?;
            }
            if with_runtime {
                let dir = bundle.join(oci_bundle::BUNDLE);
                fs::create_dir(&dir)
                    .map_err(|e| Error::internal(format_args!("mkdir {}", dir.display()), e))?;
            }
            let cgroup = inner
                .settings
                .cgroups
                .create_container(&pod_cgroup, &container_id, &limits)
                .map_err(|e| cgroup_error("config.linux.resources", &e))?;
            inner.device_filters.apply(&oci, &cgroup)?;
            plan.cgroup = Some(plan_cgroup(&cgroup));
            stave_state::write_json(&bundle.join(CONFIG), &oci, Durability::Volatile)
                .map_err(|e| Error::internal("bundle", e))?;
            stave_state::write_bytes(&bundle.join(PLAN), &plan.encode_to_vec(), Durability::Volatile)
                .map_err(|e| Error::internal("bundle", e))?;
            Ok(plan)
        })
        .await?;
        self.watch_oom(container, &pod_record.cgroup);

        stage.set("setting the container up");
        let log_path =
            spec.log_path.as_ref().map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
        let call = request::Call::CreateContainer(proto::CreateContainer {
            plan: Some(plan),
            log_path: log_path.clone(),
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            oci: runtime,
        });
        let created = match supervisor.call(call, &[]).await? {
            (packet::Body::ContainerCreated(created), _) => created,
            (other, _) => return Err(unexpected("ContainerCreated", &other)),
        };

        stage.set("recording the container");
        container.set_pid(created.pid);
        container.change(|record| {
            record.log_path = log_path;
            record.uid = created.uid;
            record.gid = created.gid;
            record.groups = created.groups;
            record.stop_signal = spec.stop_signal;
            record.stop_signal_cri = spec.stop_signal_cri.into();
        });
        self.save_container(container)?;
        if pod.state() != PodState::Ready {
            return Err(Error::new(Code::FailedPrecondition, format!("pod {pod_id}: was stopped meanwhile")));
        }
        container.show();
        Ok(())
    }

    /// From the request to the specification. Blocks: it looks at the host's side of the mounts.
    fn specify(&self, pod: &PodRecord, record: &ContainerRecord, image: &Image) -> Result<ContainerSpec> {
        let id = record.id.as_str();
        let pod_dir = self.pod_dir(&pod.id);
        let data = self.data_dir(id);
        let hostname = match pod.config.hostname.as_str() {
            "" => files::node_hostname(),
            name => name.to_owned(),
        };
        let host_ipc = pod.namespaces().ipc() == cri::NamespaceMode::Node;
        let cgroup_path = format!("{}/{id}", pod.cgroup);
        let volumes = record.image_volumes.iter().map(|volume| {
            let dirs = self.settings.images.volume_dirs(&volume.chain);
            let lower_dirs = dirs.map_err(|e| Error::internal(image_volumes::FAILED, e))?;
            Ok(stave_spec::ImageVolume { mount: volume.mount, lower_dirs })
        });
        let volumes = volumes.collect::<Result<Vec<_>>>()?;
        stave_spec::container(&ContainerFacts {
            id,
            pod: PodFacts {
                id: &pod.id,
                config: &pod.config,
                hostname: &hostname,
                resolv_conf: &pod_dir.join(files::RESOLV_CONF),
                hosts: &pod_dir.join(files::HOSTS),
                hostname_file: &pod_dir.join(files::HOSTNAME),
                shm: (!host_ipc).then(|| pod_dir.join(files::SHM)).as_deref(),
            },
            config: &record.config,
            image: &image_defaults(image),
            lower_dirs: &self.settings.images.layer_dirs(image),
            upper_dir: &data.join("upper"),
            work_dir: &data.join("work"),
            image_volumes: &volumes,
            cgroup: proto::Cgroup::default(),
            cgroup_path: &cgroup_path,
            v2: self.settings.unified_cgroup,
            apparmor: &self.settings.apparmor,
            selinux: self
                .settings
                .selinux
                .as_ref()
                .map(|policy| stave_spec::SeLinux { policy, level: &pod.selinux_level }),
            host: &LiveHost,
        })
        .map_err(|e| image_volumes::spec_error(&record.config, e))
    }

    /// What a runtime's containers can have at most.
    fn rights(&self) -> oci_bundle::Rights {
        let least_oom_score = if self.settings.lowers_oom_score {
            -1000
        } else {
            let own = fs::read_to_string("/proc/self/oom_score_adj").ok();
            own.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        let hierarchies = if self.settings.unified_cgroup {
            Vec::new()
        } else {
            let entries = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
            let dirs = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            dirs.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        oci_bundle::Rights { bounding: self.settings.bounding_set.clone(), least_oom_score, hierarchies }
    }

    /// A mount that a handler does not offer.
    fn refuse_mounts(&self, oci: &OciRuntime, config: &cri::ContainerConfig, mapped: bool) -> Result<()> {
        let handler = self.settings.runtimes.find(&oci.handler);
        let offers_recursive = handler.is_some_and(|handler| handler.recursive_read_only());
        let refused = |what: String, why: &str| {
            let message = format!("config.mounts{what}: runtime handler {:?} {why}", oci.handler);
            Err(Error::new(Code::FailedPrecondition, message))
        };
        for (n, mount) in config.mounts.iter().enumerate() {
            if mount.recursive_read_only && !offers_recursive {
                return refused(format!("[{n}].recursive_read_only true"), "does not offer it");
            }
            // To clone a mount namespace into a user namespace makes slaves of all that is shared (mount_namespaces(7)).
            if mapped && mount.propagation() == cri::MountPropagation::PropagationBidirectional {
                let what = format!("[{n}].propagation {}", mount.propagation().as_str_name());
                return refused(what, "does not offer it in a user namespace");
            }
        }
        Ok(())
    }

    /// Removes all of a container; what is gone already is success. The container must not be running.
    pub(crate) async fn remove_container(self: &Arc<Self>, container: &Arc<Container>) -> Result<()> {
        let record = container.record();
        let id = record.id.as_str();
        let pod = self.pod(&record.pod_id);
        let mut errors = Gathered::default();
        if let Some(supervisor) = pod.as_ref().and_then(|pod| pod.supervisor()).filter(|s| s.is_open()) {
            let call = proto::RemoveContainer { container_id: id.to_owned() };
            errors.add(supervisor.call_done(request::Call::RemoveContainer(call)).await);
        }
        let (inner, container_id) = (Arc::clone(self), id.to_owned());
        let bundle = self.bundle_dir(&record.pod_id, id);
        let cgroup = pod.map(|pod| pod.with(|record| record.cgroup.clone()));
        errors.add(
            blocking(move || {
                let mut errors = Gathered::default();
                if let Some(cgroup) = cgroup {
                    errors.add(inner.remove_container_cgroup(&cgroup, &container_id));
                }
                errors.add(remove_tree(&inner.data_dir(&container_id)));
                // The bundle last: it is what the rest is found by, at the latest with the pod's end.
                errors.into_result().and_then(|()| remove_tree(&bundle))
            })
            .await,
        );
        errors.into_result()?;
        self.unwatch_oom(container);
        self.settings.images.release(id).await;
        self.drop_container_record(container)?;
        self.containers_write().remove(id);
        Ok(())
    }
}

/// Waits for work that may hang, as a look at a volume on a network file system does: the pod's end does not wait for it.
async fn unless_ended<T>(supervisor: &Supervisor, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        done = work => done,
        () = supervisor.ended() => {
            Err(Error::new(Code::FailedPrecondition, "the pod's supervisor has ended"))
        }
    }
}

fn new_record(id: &str, pod_id: &str, config: cri::ContainerConfig, image: &Image) -> ContainerRecord {
    let requested = config.image.clone().unwrap_or_default();
    let asked = match requested.user_specified_image.as_str() {
        "" => requested.image,
        name => name.to_owned(),
    };
    ContainerRecord {
        id: id.to_owned(),
        pod_id: pod_id.to_owned(),
        image_id: image.id.clone(),
        image_ref: image.repo_digests.first().unwrap_or(&image.id).clone(),
        image_name: image.repo_tags.first().cloned().unwrap_or(asked),
        chain: image.chain.clone(),
        created_at: now(),
        started_at: 0,
        finished_at: 0,
        state: ContainerState::Created,
        exit_code: 0,
        reason: String::new(),
        message: String::new(),
        log_path: String::new(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        stop_signal: 0,
        stop_signal_cri: 0,
        resources: config.linux.as_ref().and_then(|linux| linux.resources.clone()),
        config,
        update: None,
        image_volumes: Vec::new(),
    }
}

fn image_defaults(image: &Image) -> ImageDefaults {
    let config = &image.config;
    ImageDefaults {
        entrypoint: config.entrypoint.clone(),
        cmd: config.cmd.clone(),
        env: config.env.clone(),
        user: config.user.clone(),
        working_dir: config.working_dir.clone(),
        volumes: config.volumes.clone(),
        stop_signal: config.stop_signal.clone(),
    }
}

pub(crate) fn cgroup_resources(resources: &stave_spec::Resources) -> stave_cgroup::Resources {
    stave_cgroup::Resources {
        cpu_shares: resources.cpu_shares,
        cpu_quota: resources.cpu_quota,
        cpu_period: resources.cpu_period,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        memory_limit: resources.memory_limit,
        memory_swap_limit: resources.memory_swap_limit,
        pids_limit: resources.pids_limit,
        hugepage_limits: resources.hugepage_limits.clone(),
        unified: resources.unified.clone(),
        ..Default::default()
    }
}

fn plan_cgroup(cgroup: &stave_cgroup::ContainerCgroup) -> proto::Cgroup {
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    proto::Cgroup {
        v2_dir: cgroup.v2_dir.as_deref().map(text).unwrap_or_default(),
        v1: cgroup
            .v1
            .iter()
            .map(|(name, dir)| proto::V1Hierarchy { name: name.clone(), dir: text(dir) })
            .collect(),
        oom_file: cgroup.oom_file.as_deref().map(text).unwrap_or_default(),
    }
}
