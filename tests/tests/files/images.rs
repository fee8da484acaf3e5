//! Images out of the store: archives that come back the same, others' tools, registries.

use std::process::Command;

use anyhow::{Result, bail};
use bulkhead_tests::Suite;
use bulkhead_tests::image::{Image, LayerBuilder};

use crate::Test;

/// An image of this test alone, one of whose layers replaces files of its own.
fn image(seed: &str) -> Result<Image> {
    let mut first = LayerBuilder::new();
    first.file("replaced", 0o644, format!("{seed} first").as_bytes())?;
    first.file("replaced", 0o600, format!("{seed} second").as_bytes())?;
    let mut second = LayerBuilder::new();
    second.file(seed, 0o755, seed.as_bytes())?;
    second.symlink("link", seed)?;
    Ok(Image::busybox()?.with_layer(first.finish()?).with_layer(second.finish()?))
}

fn skopeo(arguments: &[&str]) -> Test {
    let output = Command::new("skopeo").args(["--insecure-policy"]).args(arguments).output()?;
    if !output.status.success() {
        bail!("skopeo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

#[test]
fn what_is_saved_is_loaded_again_under_the_same_digests() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let (one, two) = (image("saved-one")?, image("saved-two")?);
    for (image, name) in [(&one, "saved/one:a"), (&two, "saved/two:b")] {
        docker.run_with(&["load"], image.archive(name)?)?.ok()?;
    }
    docker.ok(&["tag", "saved/one:a", "saved/one:c"])?;
    let save = || docker.run(&["save", "saved/one", "saved/two:b"]);
    let archive = save()?.stdout;
    let layers = docker.inspect("saved/one:a", "{{json .RootFS.Layers}}")?;
    let names = ["saved/one:a", "saved/one:c", "saved/two:b"];
    docker.ok(&[["rmi"].as_slice(), &names].concat())?;
    let loaded = docker.run_with(&["load"], archive.clone())?.ok()?;
    for name in names {
        assert!(loaded.contains(&format!("Loaded image: {name}")), "{loaded}");
    }
    assert_eq!(docker.inspect("saved/one:c", "{{.Id}}")?, one.id());
    assert_eq!(docker.inspect("saved/two:b", "{{.Id}}")?, two.id());
    assert_eq!(docker.inspect("saved/one:a", "{{json .RootFS.Layers}}")?, layers);
    assert!(save()?.stdout == archive, "the same images make the same archive");

    // Others read it in both of its forms, and what they write is read here.
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("saved.tar"), &archive)?;
    let docker_archive = format!("docker-archive:{}:saved/one:a", at("saved.tar"));
    skopeo(&["copy", &docker_archive, &format!("docker-archive:{}:by/skopeo:1", at("out.tar"))])?;
    std::fs::create_dir(at("layout"))?;
    let unpacked = Command::new("tar").args(["-xf", &at("saved.tar"), "-C", &at("layout")]).status()?;
    assert!(unpacked.success());
    let layout = format!("oci:{}:b", at("layout"));
    skopeo(&["copy", &layout, &format!("oci-archive:{}:by/skopeo:2", at("oci.tar"))])?;
    docker.ok(&[["rmi"].as_slice(), &names].concat())?;
    for (file, name, id) in [("out.tar", "by/skopeo:1", one.id()), ("oci.tar", "by/skopeo:2", two.id())] {
        docker.ok(&["load", "-i", &at(file)])?;
        assert_eq!(docker.inspect(name, "{{.Id}}")?, id, "{name}");
    }
    let run = docker.ok(&["run", "--rm", "by/skopeo:1", "sh", "-c", "cat /replaced /link"])?;
    assert_eq!(run, "saved-one secondsaved-one");
    docker.ok(&["rmi", "by/skopeo:1", "by/skopeo:2"])?;
    let none = docker.run(&["save", "no/such"])?;
    assert!(none.code != 0 && none.stderr.contains("No such image"), "{}", none.stderr);
    Ok(())
}

#[test]
fn what_is_pushed_is_pulled_again() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let image = image("pushed")?;
    let name = format!("{}/team/pushed:1", suite.registry);
    docker.run_with(&["load"], image.archive(&name)?)?.ok()?;
    let pushed = docker.ok(&["push", &name])?;
    assert!(pushed.contains("1: digest: sha256:"), "{pushed}");
    let digest = pushed.split("digest: ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    let again = docker.ok(&["push", &name])?;
    assert!(again.contains("Layer already exists") && again.contains(digest), "{again}");
    // Under another name of the same registry the layers are mounted, not sent.
    let other = format!("{}/other/name:2", suite.registry);
    docker.ok(&["tag", &name, &other])?;
    let mounted = docker.ok(&["push", &other])?;
    assert!(
        mounted.contains("Mounted from team/pushed") || mounted.contains("Layer already exists"),
        "{mounted}"
    );
    docker.ok(&["rmi", &name, &other])?;
    docker.ok(&["pull", &other])?;
    assert_eq!(docker.inspect(&other, "{{.Id}}")?, image.id());
    docker.ok(&["rmi", &other])?;
    let by_digest = format!("{}/team/pushed@{digest}", suite.registry);
    docker.ok(&["pull", &by_digest])?;
    docker.ok(&["rmi", &by_digest])?;
    let refused = docker.run(&["push", "127.0.0.1:1/no/such:1"])?;
    assert!(refused.code != 0 && refused.stderr.contains("does not exist locally"), "{}", refused.stderr);
    Ok(())
}
