//! The image RPCs.

use std::collections::HashMap;

use serde_json::{Value, json};
use stave_cri_proto::v1 as cri;
use stave_images::{Auth, Image};
use tonic::Status;

use crate::Services;
use crate::info::info;
use crate::status::{image_error, missing};

impl Services {
    pub(crate) async fn pull(
        &self,
        request: cri::PullImageRequest,
    ) -> Result<cri::PullImageResponse, Status> {
        let reference = required(request.image)?;
        let auth = request.auth.map(|auth| Auth {
            username: auth.username,
            password: auth.password,
            auth: auth.auth,
            server_address: auth.server_address,
            identity_token: auth.identity_token,
            registry_token: auth.registry_token,
        });
        let image = self.0.images.pull(&reference, auth).await.map_err(image_error)?;
        Ok(cri::PullImageResponse { image_ref: image.id.clone() })
    }

    pub(crate) fn list_all_images(&self, filter: Option<cri::ImageFilter>) -> Vec<cri::Image> {
        let wanted = filter.and_then(|filter| filter.image).map(|image| image.image).unwrap_or_default();
        if wanted.is_empty() {
            return self.0.images.list().iter().map(|image| entry(image)).collect();
        }
        self.0.images.find(&wanted).iter().map(|image| entry(image)).collect()
    }

    pub(crate) fn status_of_image(
        &self,
        request: cri::ImageStatusRequest,
    ) -> Result<cri::ImageStatusResponse, Status> {
        let reference = required(request.image)?;
        let Some(image) = self.0.images.find(&reference) else {
            return Ok(cri::ImageStatusResponse::default());
        };
        let info = if request.verbose {
            let spec: Value = serde_json::from_str(&image.raw_config)
                .map_err(|e| Status::internal(format!("configuration of image {}: {e}", image.id)))?;
            info(&json!({ "chainIDs": image.chain, "imageSpec": spec }))?
        } else {
            HashMap::new()
        };
        Ok(cri::ImageStatusResponse { image: Some(entry(&image)), info })
    }

    pub(crate) async fn remove_image_by_name(&self, request: cri::RemoveImageRequest) -> Result<(), Status> {
        let reference = required(request.image)?;
        self.0.images.remove(&reference).await.map_err(image_error)
    }

    pub(crate) fn fs_info(&self) -> cri::ImageFsInfoResponse {
        let info = self.0.images.fs_info();
        let usage = cri::FilesystemUsage {
            timestamp: now(),
            fs_id: Some(cri::FilesystemIdentifier {
                mountpoint: info.mountpoint.to_string_lossy().into_owned(),
            }),
            used_bytes: Some(cri::UInt64Value { value: info.used_bytes }),
            inodes_used: Some(cri::UInt64Value { value: info.inodes_used }),
        };
        // Images and writable layers are on one file system.
        cri::ImageFsInfoResponse {
            image_filesystems: vec![usage.clone()],
            container_filesystems: vec![usage],
        }
    }
}

fn required(image: Option<cri::ImageSpec>) -> Result<String, Status> {
    image.map(|image| image.image).filter(|image| !image.is_empty()).ok_or_else(|| missing("image.image"))
}

fn entry(image: &Image) -> cri::Image {
    // The part before the colon; a number is a uid, never a name.
    let user = image.config.user.split(':').next().unwrap_or_default();
    let (uid, username) = match user.parse::<i64>() {
        Ok(uid) => (Some(cri::Int64Value { value: uid }), String::new()),
        Err(_) => (None, user.to_owned()),
    };
    cri::Image {
        id: image.id.clone(),
        repo_tags: image.repo_tags.clone(),
        repo_digests: image.repo_digests.clone(),
        size: image.size,
        uid,
        username,
        spec: None,
        pinned: image.pinned,
    }
}

/// Nanoseconds since the Unix epoch.
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
