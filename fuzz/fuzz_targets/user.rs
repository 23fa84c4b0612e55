//! Any /etc/passwd and /etc/group of an image, and any user to find in them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stave_supervisor_proto::v1::User;

fuzz_target!(|data: (&[u8], &[u8], &str, u32, Option<u32>, &str, bool)| {
    let (passwd, group, name, uid, gid, group_name, merge_image_groups) = data;
    let user = User {
        name: name.to_owned(),
        uid,
        gid,
        group_name: group_name.to_owned(),
        merge_image_groups,
        ..Default::default()
    };
    if let Ok((uid, gid, groups)) = stave_executor::fuzz_user(&user, passwd, group) {
        assert!(uid <= i32::MAX as u32 && gid <= i32::MAX as u32);
        assert!(groups.contains(&gid) && groups.iter().all(|group| *group <= i32::MAX as u32));
    }
});
