//! Images mounted into containers.

use stave_cri_proto::v1 as cri;
use stave_images::Images;
use stave_spec::SpecError;

use crate::error::Error;
use crate::record::ImageVolume;

/// Begins the message of a failed CreateContainer where the failure is that of an image volume: the kubelet
/// counts those.
pub(crate) const FAILED: &str = "ImageVolumeMountFailed";

/// The images that the request's mounts name. One that is not here is left out; the specification reports it.
pub(crate) fn find(images: &Images, config: &cri::ContainerConfig) -> Vec<ImageVolume> {
    let named =
        config.mounts.iter().enumerate().filter_map(|(index, mount)| Some((index, mount.image.as_ref()?)));
    named
        .filter_map(|(mount, wanted)| {
            let image = images.find(&wanted.image)?;
            Some(ImageVolume { mount, image_id: image.id.clone(), chain: image.chain.clone() })
        })
        .collect()
}

/// All layers that a container uses: those of its image, and of the images mounted into it.
pub(crate) fn layers(chain: &[String], volumes: &[ImageVolume]) -> Vec<String> {
    let mut all = chain.to_vec();
    for layer in volumes.iter().flat_map(|volume| &volume.chain) {
        if !all.contains(layer) {
            all.push(layer.clone());
        }
    }
    all
}

/// An error of the specification; one about an image volume says so first.
pub(crate) fn spec_error(config: &cri::ContainerConfig, error: SpecError) -> Error {
    let of_volume = config.mounts.iter().enumerate().any(|(index, mount)| {
        mount.image.is_some() && error.field.starts_with(&format!("config.mounts[{index}]."))
    });
    let mut error = Error::from(error);
    if of_volume {
        error.message = format!("{FAILED}: {}", error.message);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use stave_spec::Code;

    #[test]
    fn layers_are_counted_once() {
        let chain = |layers: &[&str]| layers.iter().map(|layer| (*layer).to_owned()).collect::<Vec<_>>();
        let volume = |layers| ImageVolume { mount: 0, image_id: String::new(), chain: chain(layers) };
        let all = layers(&chain(&["a", "b"]), &[volume(&["a", "c"]), volume(&["c", "d"])]);
        assert_eq!(all, ["a", "b", "c", "d"]);
    }

    #[test]
    fn the_kubelets_word_comes_first_and_only_for_image_volumes() {
        let image = cri::Mount { image: Some(cri::ImageSpec::default()), ..Default::default() };
        let config =
            cri::ContainerConfig { mounts: vec![cri::Mount::default(), image], ..Default::default() };
        let message = |field: &str| {
            let error = SpecError::new(Code::InvalidArgument, field, "x", "is wrong");
            spec_error(&config, error).message
        };
        assert_eq!(
            message("config.mounts[1].readonly"),
            "ImageVolumeMountFailed: config.mounts[1].readonly: value \"x\": is wrong"
        );
        assert!(message("config.mounts[0].readonly").starts_with("config.mounts[0]"));
        assert!(message("config.mounts[11].readonly").starts_with("config.mounts[11]"));
    }
}
