//! The CRI's ImageService: each RPC to its place.

use std::pin::Pin;

use stave_cri_proto::v1::image_service_server::ImageService;
use stave_cri_proto::v1::*;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::Services;
use crate::status::unbuilt;

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ImageService for Services {
    type StreamImagesStream = Pin<Box<dyn Stream<Item = Result<StreamImagesResponse, Status>> + Send>>;

    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(ListImagesResponse { images: self.list_all_images(request.into_inner().filter) }))
    }

    async fn stream_images(&self, _: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        unbuilt("StreamImages")
    }

    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        self.status_of_image(request.into_inner()).map(Response::new)
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        self.pull(request.into_inner()).await.map(Response::new)
    }

    async fn remove_image(&self, request: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        self.remove_image_by_name(request.into_inner()).await?;
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        Ok(Response::new(self.fs_info()))
    }
}
