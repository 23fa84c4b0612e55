//! What names an image or comes from a registry, and hosts.toml.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stave_images::Reference;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(reference) = Reference::parse(text)
    {
        let again = Reference::parse(&reference.to_string()).expect("a reference's own text");
        assert_eq!(again, reference);
        assert!(!reference.domain().is_empty() && !reference.path().contains(".."));
    }
    stave_images::fuzz_documents(data);
});
