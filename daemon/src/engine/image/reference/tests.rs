use proptest::prelude::*;

use super::*;

const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn names_are_normalised_and_made_familiar_again() {
    let digest = format!("sha256:{HEX}");
    for (text, complete, familiar) in [
        ("busybox", "docker.io/library/busybox", "busybox"),
        ("busybox:1.36", "docker.io/library/busybox:1.36", "busybox:1.36"),
        ("docker.io/busybox", "docker.io/library/busybox", "busybox"),
        ("index.docker.io/busybox", "docker.io/library/busybox", "busybox"),
        ("library/busybox", "docker.io/library/busybox", "busybox"),
        ("docker.io/library/busybox:a", "docker.io/library/busybox:a", "busybox:a"),
        ("user/app", "docker.io/user/app", "user/app"),
        ("library/a/b", "docker.io/library/a/b", "library/a/b"),
        ("localhost/a", "localhost/a", "localhost/a"),
        ("localhost:5000/a", "localhost:5000/a", "localhost:5000/a"),
        ("LOCALHOST/a", "LOCALHOST/a", "LOCALHOST/a"),
        ("Foo/bar", "Foo/bar", "Foo/bar"),
        ("[::1]:5000/a", "[::1]:5000/a", "[::1]:5000/a"),
        ("[2001:db8::1]/a:b", "[2001:db8::1]/a:b", "[2001:db8::1]/a:b"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("a.b/c", "a.b/c", "a.b/c"),
        ("xn--n3h.com/a", "xn--n3h.com/a", "xn--n3h.com/a"),
        ("a__b/c-_d", "", ""),
        ("a__b/c---d.e_f", "docker.io/a__b/c---d.e_f", "a__b/c---d.e_f"),
        ("a:_.-Z", "docker.io/library/a:_.-Z", "a:_.-Z"),
    ] {
        if complete.is_empty() {
            assert_eq!(Reference::parse(text), Err(ReferenceError::Format), "{text}");
            continue;
        }
        let reference = Reference::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((reference.to_string().as_str(), reference.familiar().as_str()), (complete, familiar));
    }
    let both = Reference::parse(&format!("busybox:1@{digest}")).unwrap();
    assert_eq!((both.tag(), both.digest().map(|d| d.to_string())), (Some("1"), Some(digest.clone())));
    assert_eq!(both.familiar(), format!("busybox:1@{digest}"));
    let digested = Reference::parse(&format!("busybox@{digest}")).unwrap().or_latest();
    assert_eq!((digested.tag(), digested.is_name_only()), (None, false));
    assert_eq!(Reference::parse("busybox").unwrap().or_latest().familiar(), "busybox:latest");
}

#[test]
fn refusals_have_dockers_words() {
    for (text, error) in [
        ("", "invalid reference format"),
        (":latest", "invalid reference format"),
        ("busybox:", "invalid reference format"),
        ("a//b", "invalid reference format"),
        ("/a", "invalid reference format"),
        ("a/", "invalid reference format"),
        ("a b", "invalid reference format"),
        ("a..b", "invalid reference format"),
        ("a___b", "invalid reference format"),
        ("-a", "invalid reference format"),
        ("a_", "invalid reference format"),
        ("http://a.b/c", "invalid reference format"),
        ("a.b:x/c", "invalid reference format"),
        ("-a.b/c", "invalid reference format"),
        ("[::1/a", "invalid reference format"),
        ("[fe80::1%eth0]:1/a", "invalid reference format"),
        ("a@sha256:123", "invalid reference format"),
        ("a@sha256", "invalid reference format"),
        ("a:b:c", "invalid reference format"),
        ("ä", "invalid reference format"),
        ("Foo", "invalid reference format: repository name (library/Foo) must be lowercase"),
        ("a.b/Foo:x", "invalid reference format: repository name (Foo) must be lowercase"),
        (
            HEX,
            "invalid repository name (e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855), cannot specify 64-byte hexadecimal strings",
        ),
    ] {
        assert_eq!(Reference::parse(text).map_err(|e| e.to_string()), Err(error.to_owned()), "{text:?}");
    }
    let sha512 = format!("a@sha512:{HEX}{HEX}");
    assert_eq!(Reference::parse(&sha512), Err(ReferenceError::Digest(DigestError::Algorithm)));
    assert_eq!(Reference::parse(&"a".repeat(300)), Err(ReferenceError::TooLong));
    assert_eq!(Reference::parse(&format!("a:{}", "b".repeat(129))), Err(ReferenceError::Format));
    assert_eq!(Reference::parse("a").unwrap().with_tag("-"), Err(ReferenceError::Tag));
}

#[test]
fn ids_are_told_from_names() {
    let id = Digest::from_hex(HEX).unwrap();
    assert_eq!(AnyReference::parse(HEX), Ok(AnyReference::Id(id)));
    assert_eq!(AnyReference::parse(&format!("sha256:{HEX}")), Ok(AnyReference::Id(id)));
    assert!(matches!(AnyReference::parse("e3b0c44298fc"), Ok(AnyReference::Named(_))));
    assert!(matches!(AnyReference::parse("sha256:e3b0"), Ok(AnyReference::Named(_))));
}

#[test]
fn filters_match_the_familiar_form_with_and_without_the_tag() {
    let reference = Reference::parse("busybox:1.36").unwrap();
    for (pattern, matches) in [
        ("busybox", true),
        ("busybox:1.36", true),
        ("busy*", true),
        ("*:1.*", true),
        ("alpine", false),
        ("*/*", false),
    ] {
        assert_eq!(reference.matches(pattern).unwrap(), matches, "{pattern}");
    }
    assert!(Reference::parse("a.b/c/d").unwrap().matches("a.b/*/d").unwrap());
    assert!(reference.matches("[").is_err());
}

proptest! {
    #[test]
    fn what_parses_has_one_complete_form(text in "[a-zA-Z0-9._:/@\\[\\]-]{0,40}") {
        if let Ok(reference) = Reference::parse(&text) {
            prop_assert_eq!(Reference::parse(&reference.to_string()), Ok(reference));
        }
    }

    #[test]
    fn well_formed_parts_always_parse(
        domain in "[a-z][a-z0-9]{0,5}\\.[a-z]{2}(:[0-9]{1,5})?",
        path in "[a-z0-9]{1,5}((\\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}(/[a-z0-9]{1,5}){0,3}",
        tag in "[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,20}",
    ) {
        let text = format!("{domain}/{path}:{tag}");
        let reference = Reference::parse(&text).unwrap();
        prop_assert_eq!(reference.repository().domain(), domain);
        prop_assert_eq!(reference.repository().path(), path);
        prop_assert_eq!(reference.tag(), Some(tag.as_str()));
        prop_assert_eq!(reference.familiar(), text);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "\\PC{0,60}") {
        let _ = Reference::parse(&text);
        let _ = AnyReference::parse(&text);
    }
}
