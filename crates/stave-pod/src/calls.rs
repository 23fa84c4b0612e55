//! From a message of the daemon to the call that it asks for.

use prost::Message as _;
use rustix::process::PidfdFlags;
use stave_supervisor_proto::VERSION;
use stave_supervisor_proto::v1::packet::Body;
use stave_supervisor_proto::v1::request::Call;
use stave_supervisor_proto::v1::{
    AckExit, ContainerList, Done, Failure, Hello, HelloReply, PodReady, Request, SetUpPod,
};
use stave_wire::Message;

use crate::connection::ReplyTo;
use crate::container::State;
use crate::event_loop::Key;
use crate::report::report;
use crate::supervisor::Supervisor;
use crate::{failure, ids};

/// What a call answers at once; `None`: the reply comes later or is sent.
pub(crate) type Answer = Result<Option<Body>, Failure>;

/// The answer of calls that have nothing to tell.
pub(crate) const DONE: Answer = Ok(Some(Body::Done(Done {})));

impl Supervisor {
    /// Carries out one request.
    pub(crate) fn call(&mut self, connection: Key, message: Message) {
        let Request { seq, call } = match Request::decode(&message.payload[..]) {
            Ok(request) if request.seq != 0 => request,
            Ok(_) => return self.lose_connection(&"a request had no number"),
            Err(error) => return self.lose_connection(&format!("malformed request: {error}")),
        };
        drop(message.payload);
        let to = ReplyTo { connection, seq };
        let answer = match call {
            None => Err(failure::invalid("the request has no call that this version knows")),
            Some(Call::Hello(hello)) => return self.hello(to, &hello),
            Some(_) if !self.is_greeted() => Err(failure::precondition("the first call must be Hello")),
            Some(call) if self.shutdown.is_some() && makes_something(&call) => {
                Err(failure::precondition("the pod is shutting down"))
            }
            Some(Call::SetUpPod(call)) => self.set_up_pod(to, call),
            Some(Call::CreateContainer(call)) => self.create_container(to, call),
            Some(Call::StartContainer(call)) => self.start_container(to, &call),
            Some(Call::StopContainer(call)) => self.stop_container(&call),
            Some(Call::RemoveContainer(call)) => self.remove_container(to, &call),
            Some(Call::Exec(call)) => self.exec(to, call, message.fds),
            Some(Call::KillExec(call)) => self.kill_exec(&call),
            Some(Call::Attach(call)) => self.attach(to, &call),
            Some(Call::Connect(call)) => self.connect(to, &call),
            Some(Call::ReopenLog(call)) => self.reopen_log(&call),
            Some(Call::ListContainers(_)) => Ok(Some(self.list_containers())),
            Some(Call::AckExit(call)) => self.acknowledge_exit(&call),
            Some(Call::Shutdown(_)) => {
                self.shut_down(to);
                Ok(None)
            }
        };
        match answer {
            Ok(Some(body)) => self.reply(to, body, None),
            Ok(None) => {}
            Err(failure) => self.reply(to, Body::Failure(failure), None),
        }
    }

    fn is_greeted(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.greeted)
    }

    /// Another version than ours or the one before is refused. A newer daemon says Hello again, on
    /// the same connection, with an older version.
    fn hello(&mut self, to: ReplyTo, hello: &Hello) {
        if hello.version == 0 || (hello.version != VERSION && hello.version.checked_add(1) != Some(VERSION)) {
            let refusal = failure::precondition(format!(
                "protocol version {}: this supervisor speaks {VERSION} and the one before",
                hello.version
            ));
            return self.reply(to, Body::Failure(refusal), None);
        }
        let pid = rustix::process::getpid();
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(errno) => {
                return self.reply(
                    to,
                    Body::Failure(failure::system("pidfd_open of the supervisor", errno)),
                    None,
                );
            }
        };
        let reply = HelloReply {
            version: VERSION,
            pod_id: self.pod_id.clone(),
            build: env!("CARGO_PKG_VERSION").to_owned(),
            set_up: self.pod.is_set_up(),
            pid: pid.as_raw_nonzero().get(),
        };
        self.reply(to, Body::Hello(reply), Some(pidfd));
        if let Some(connection) = &mut self.connection {
            connection.greeted = true;
        }
        self.tell_exits();
    }

    fn set_up_pod(&mut self, to: ReplyTo, request: SetUpPod) -> Answer {
        let network_namespace = self.pod.set_up(request, &self.events)?;
        self.reply(to, Body::PodReady(PodReady {}), Some(network_namespace));
        Ok(None)
    }

    fn list_containers(&self) -> Body {
        let containers = self.containers.values().map(|container| container.entry()).collect();
        Body::ContainerList(ContainerList { containers })
    }

    fn acknowledge_exit(&mut self, call: &AckExit) -> Answer {
        ids::check("container_id", &call.container_id)?;
        for container in self.containers.values_mut().filter(|one| one.id == call.container_id) {
            if let State::Exited { acknowledged, .. } = &mut container.state {
                *acknowledged = true;
                container.record_at = None;
                if let Err(error) = self.exits.delete(&call.container_id) {
                    report!("container {}: delete the exit record: {error}", call.container_id);
                }
            }
        }
        DONE
    }
}

/// Calls that a pod which shuts down must refuse.
fn makes_something(call: &Call) -> bool {
    matches!(call, Call::SetUpPod(_) | Call::CreateContainer(_) | Call::StartContainer(_) | Call::Exec(_))
}
