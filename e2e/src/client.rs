use std::path::Path;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};
use tower::service_fn;

/// A client of a CRI socket, as the kubelet is one: h2c, authority `localhost`, one connection.
#[derive(Clone, Debug)]
pub struct Cri {
    /// The generated client of the runtime service, for calls that have no short form here.
    pub runtime: RuntimeServiceClient<Channel>,
    /// The generated client of the image service.
    pub images: ImageServiceClient<Channel>,
}

macro_rules! calls {
    ($($client:ident.$name:ident($request:ty) -> $response:ty;)*) => {
        $(
            #[doc = concat!("The call `", stringify!($name), "`.")]
            pub async fn $name(&self, request: $request) -> Result<$response, Status> {
                Box::pin(self.$client.clone().$name(request)).await.map(Response::into_inner)
            }
        )*
    };
}

impl Cri {
    /// Connects to the socket at `path`; each call gets `timeout`.
    pub async fn connect(path: &Path, timeout: Duration) -> anyhow::Result<Cri> {
        let path = path.to_owned();
        let channel = Endpoint::from_static("http://localhost")
            .timeout(timeout)
            .connect_with_connector(service_fn(move |_: Uri| {
                let path = path.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
            }))
            .await?;
        let limit = 16 << 20;
        Ok(Cri {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(limit),
            images: ImageServiceClient::new(channel).max_decoding_message_size(limit),
        })
    }

    calls! {
        runtime.version(VersionRequest) -> VersionResponse;
        runtime.status(StatusRequest) -> StatusResponse;
        runtime.runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        runtime.run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
        runtime.pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        runtime.list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        runtime.create_container(CreateContainerRequest) -> CreateContainerResponse;
        runtime.container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        runtime.list_containers(ListContainersRequest) -> ListContainersResponse;
        runtime.exec_sync(ExecSyncRequest) -> ExecSyncResponse;
        runtime.reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        runtime.update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        images.pull_image(PullImageRequest) -> PullImageResponse;
        images.list_images(ListImagesRequest) -> ListImagesResponse;
        images.image_status(ImageStatusRequest) -> ImageStatusResponse;
        images.remove_image(RemoveImageRequest) -> RemoveImageResponse;
        images.image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
    }

    /// Pulls an image; gives its reference.
    pub async fn pull(&self, image: &str) -> Result<String, Status> {
        let request = PullImageRequest { image: Some(spec(image)), ..Default::default() };
        Ok(self.pull_image(request).await?.image_ref)
    }

    /// The image's status, `None` when it is not there.
    pub async fn image(&self, image: &str) -> Result<Option<Image>, Status> {
        let request = ImageStatusRequest { image: Some(spec(image)), verbose: false };
        Ok(self.image_status(request).await?.image)
    }

    /// Removes an image.
    pub async fn remove_image_named(&self, image: &str) -> Result<(), Status> {
        self.remove_image(RemoveImageRequest { image: Some(spec(image)) }).await.map(drop)
    }

    /// Runs a pod; gives its id.
    pub async fn run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        Ok(self.run_pod_sandbox(request).await?.pod_sandbox_id)
    }

    /// Stops a pod.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().stop_pod_sandbox(request).await.map(drop)
    }

    /// Removes a pod.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        self.runtime.clone().remove_pod_sandbox(request).await.map(drop)
    }

    /// The pod's status.
    pub async fn pod(&self, id: &str) -> Result<PodSandboxStatus, Status> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        Ok(self.pod_sandbox_status(request).await?.status.expect("PodSandboxStatus without a status"))
    }

    /// The pods that a filter lets through.
    pub async fn pods(&self, filter: Option<PodSandboxFilter>) -> Result<Vec<PodSandbox>, Status> {
        Ok(self.list_pod_sandbox(ListPodSandboxRequest { filter }).await?.items)
    }

    /// Creates a container; gives its id.
    pub async fn create(
        &self,
        pod: &str,
        config: &ContainerConfig,
        pod_config: &PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config.clone()),
            sandbox_config: Some(pod_config.clone()),
        };
        Ok(Box::pin(self.create_container(request)).await?.container_id)
    }

    /// Starts a container.
    pub async fn start(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().start_container(request).await.map(drop)
    }

    /// Stops a container; `timeout` in seconds.
    pub async fn stop(&self, id: &str, timeout: i64) -> Result<(), Status> {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout };
        self.runtime.clone().stop_container(request).await.map(drop)
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().remove_container(request).await.map(drop)
    }

    /// The container's status.
    pub async fn container(&self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        Ok(self.container_status(request).await?.status.expect("ContainerStatus without a status"))
    }

    /// The containers that a filter lets through.
    pub async fn containers(&self, filter: Option<ContainerFilter>) -> Result<Vec<Container>, Status> {
        Ok(self.list_containers(ListContainersRequest { filter }).await?.containers)
    }

    /// Runs a command in a container, for ten seconds at most.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 10,
        };
        self.exec_sync(request).await
    }

    /// The output of a command that must succeed and say nothing on stderr.
    pub async fn output(&self, id: &str, command: &[&str]) -> String {
        let result = self.exec(id, command).await.expect("ExecSync");
        let stderr = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!((result.exit_code, stderr.as_str()), (0, ""), "{command:?}");
        String::from_utf8(result.stdout).expect("output is UTF-8")
    }

    /// The output of a shell script that must succeed.
    pub async fn shell(&self, id: &str, script: &str) -> String {
        self.output(id, &["/bin/sh", "-c", script]).await
    }

    /// Waits for the container's end, ten seconds at most (see [`crate::limit`]).
    pub async fn exited(&self, id: &str) -> ContainerStatus {
        let end = Instant::now() + crate::limit(10);
        loop {
            let status = self.container(id).await.expect("ContainerStatus");
            if status.state() == ContainerState::ContainerExited {
                return status;
            }
            assert!(Instant::now() < end, "container {id} did not end in time: {status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops and removes all pods.
    pub async fn remove_all(&self) -> Result<(), Status> {
        for pod in self.pods(None).await? {
            self.stop_pod(&pod.id).await?;
            self.remove_pod(&pod.id).await?;
        }
        Ok(())
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..Default::default() }
}
