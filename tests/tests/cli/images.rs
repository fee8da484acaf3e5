//! Images: from a registry, from a file, by their names, and gone again.

use bulkhead_tests::image::{Image, LayerBuilder};
use bulkhead_tests::{Output, Suite};

use crate::Test;

/// An image of this test alone: busybox and a file of its own.
fn image(name: &str) -> anyhow::Result<Image> {
    let mut layer = LayerBuilder::new();
    layer.file(&format!("{name}.txt"), 0o644, name.as_bytes())?;
    Ok(Image::busybox()?.with_layer(layer.finish()?))
}

#[test]
fn pull_by_tag_and_by_digest_and_run() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let image = image("pulled")?;
    suite.push(&image, "team/pulled", "v1")?;
    let reference = format!("{}/team/pulled:v1", suite.registry);
    let text = docker.ok(&["pull", &reference])?;
    let digest = text.lines().find_map(|line| line.strip_prefix("Digest: ")).expect("a digest").to_owned();
    assert!(text.contains("Downloaded newer image"), "{text}");
    assert!(docker.ok(&["pull", &reference])?.contains("Image is up to date"));
    assert_eq!(docker.inspect(&reference, "{{.Id}}")?, image.id());
    assert_eq!(docker.ok(&["run", "--rm", &reference, "cat", "/pulled.txt"])?, "pulled");
    let by_digest = format!("{}/team/pulled@{digest}", suite.registry);
    docker.ok(&["pull", &by_digest])?;
    assert_eq!(docker.inspect(&by_digest, "{{.Id}}")?, image.id());
    Ok(())
}

#[test]
fn run_pulls_what_is_missing() -> Test {
    let suite = Suite::from_env()?;
    suite.push(&image("missing")?, "library/missing", "latest")?;
    let output = suite.docker().run(&["run", "--rm", "missing", "cat", "/missing.txt"])?;
    assert!(output.stderr.contains("Unable to find image 'missing:latest' locally"), "{}", output.stderr);
    assert_eq!(output.ok()?, "missing");
    Ok(())
}

#[test]
fn load_tag_list_and_remove() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let image = image("loaded")?;
    let loaded = docker.run_with(&["load"], image.archive("loaded:a")?)?;
    assert!(loaded.ok()?.contains("Loaded image: loaded:a"));
    docker.ok(&["tag", "loaded:a", "loaded:b"])?;
    let list = || docker.ok(&["images", "--no-trunc", "--format", "{{.Tag}} {{.ID}}", "loaded"]);
    let id = image.id();
    let mut both: Vec<String> = list()?.lines().map(str::to_owned).collect();
    both.sort();
    assert_eq!(both, [format!("a {id}"), format!("b {id}")]);
    assert!(docker.ok(&["rmi", "loaded:a"])?.contains("Untagged: loaded:a"));
    assert_eq!(list()?, format!("b {id}"));
    assert!(docker.ok(&["rmi", "loaded:b"])?.contains(&format!("Deleted: {id}")));
    assert_eq!(list()?, "");
    Ok(())
}

#[test]
fn an_image_in_use_is_not_removed() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    docker.run_with(&["load"], image("in-use")?.archive("in-use:latest")?)?.ok()?;
    let container = docker.run_detached(&["in-use", "sleep", "1000"])?;
    let output = docker.run(&["rmi", "in-use"])?;
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("conflict"), "{}", output.stderr);
    assert_eq!(container.exec(&["cat", "/in-use.txt"])?, "in-use");
    Ok(())
}

fn refused(output: &Output, word: &str) {
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains(word), "{word}: {}", output.stderr);
    assert!(output.stderr.lines().count() < 8, "a message, not a story: {}", output.stderr);
}

#[test]
fn unknown_images_and_bad_references_are_refused_clearly() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let unknown = docker.run(&["run", "--rm", "never-pushed", "true"])?;
    assert_eq!(unknown.code, 125);
    refused(&unknown, "never-pushed");
    refused(&docker.run(&["pull", &format!("{}/never/pushed", suite.registry)])?, "not found");
    refused(&docker.run(&["pull", "busybox:no-such-tag"])?, "no-such-tag");
    refused(&docker.run(&["pull", "Upper/Case"])?, "invalid reference format");
    refused(&docker.run(&["image", "inspect", "never-pulled"])?, "No such image");
    Ok(())
}

#[test]
fn containers_of_one_image_share_its_layers_on_disk() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let host = bulkhead_tests::Host::from_env()?;
    // Eight megabytes that do not compress, in a layer of their own.
    let mut layer = LayerBuilder::new();
    let big: Vec<u8> = (0..2 << 20).flat_map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    layer.file("big", 0o644, &big)?;
    docker
        .run_with(&["load"], Image::busybox()?.with_layer(layer.finish()?).archive("shared:latest")?)?
        .ok()?;
    let first = docker.run_detached(&["shared", "sleep", "1000"])?;
    let second = docker.run_detached(&["shared", "sleep", "1000"])?;
    let sums: Vec<String> =
        [&first, &second].into_iter().map(|c| c.exec(&["sha256sum", "/big"])).collect::<Result<_, _>>()?;
    assert_eq!(sums[0], sums[1]);
    let used = |container: &str| -> anyhow::Result<u64> {
        let id = docker.inspect(container, "{{.Id}}")?;
        let kib = host.sh("du -sk \"$1\" | cut -f1", &[&format!("{}/containers/{id}", suite.data_root)])?;
        Ok(kib.parse()?)
    };
    // What each container has for itself is far less than the layer it reads.
    assert!(used(first.name())? < 6 << 10, "{} KiB", used(first.name())?);
    assert!(used(second.name())? < 6 << 10, "{} KiB", used(second.name())?);
    Ok(())
}

#[test]
fn system_df_counts_images_and_containers() -> Test {
    let docker = Suite::from_env()?.docker();
    let _container = docker.run_detached(&["busybox", "sleep", "1000"])?;
    let text = docker.ok(&["system", "df", "--format", "{{.Type}} {{.TotalCount}}"])?;
    let count =
        |kind: &str| text.lines().find_map(|line| line.strip_prefix(kind)?.trim().parse::<u32>().ok());
    assert!(count("Images ").is_some_and(|count| count >= 1), "{text}");
    assert!(count("Containers ").is_some_and(|count| count >= 1), "{text}");
    Ok(())
}
