//! `docker commit`: what a container has become is what containers of its image begin with.

use bulkhead_tests::Suite;
use bulkhead_tests::image::{Image, LayerBuilder};

use crate::Test;

#[test]
fn an_image_of_a_container_has_its_changes_and_nothing_else() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let mut layer = LayerBuilder::new();
    layer.directory("data", 0o755)?;
    layer.file("data/old", 0o644, b"old")?;
    docker
        .run_with(&["load"], Image::busybox()?.with_layer(layer.finish()?).archive("to-commit:it")?)?
        .ok()?;
    let script = "echo kept > /kept; rm /bin/wc; rm -r /data; mkdir /data; echo new > /data/new; chmod 700 /bin; \
                  touch /tmp/done; exec sleep 100000";
    let container = docker.run_detached(&["-e", "SOME=thing", "to-commit:it", "sh", "-c", script])?;
    container.exec(&["sh", "-c", "until [ -e /tmp/done ]; do sleep 0.1; done"])?;
    let id = docker.ok(&[
        "commit",
        "-m",
        "a message",
        "-a",
        "an author",
        "-c",
        "CMD [\"cat\", \"/kept\"]",
        "-c",
        "LABEL k=v",
        container.name(),
        "committed:one",
    ])?;
    assert_eq!(
        docker.inspect("committed:one", "{{.Id}} {{.Comment}} {{.Author}}")?,
        format!("{id} a message an author")
    );
    assert_eq!(
        docker.inspect("committed:one", "{{.Config.Labels.k}} {{index .Config.Env 0}}")?,
        "v SOME=thing"
    );
    let running = docker.inspect(container.name(), "{{.State.Status}}")?;
    assert_eq!(running, "running", "it was paused, and runs again");
    assert_eq!(docker.ok(&["run", "--rm", "committed:one"])?, "kept");
    let look = "[ ! -e /bin/wc ] && stat -c %a /bin && ls /data && echo $SOME";
    let seen = docker.ok(&["run", "--rm", "committed:one", "sh", "-c", look])?;
    assert_eq!(seen.lines().collect::<Vec<_>>(), ["700", "new", "thing"]);
    let history = docker.ok(&["history", "--format", "{{.Comment}}", "committed:one"])?;
    assert_eq!(history.lines().next(), Some("a message"));

    // Of what does not run, and of nothing new.
    container.docker(&["kill"])?;
    docker.ok(&["commit", container.name(), "committed:two"])?;
    assert_eq!(docker.ok(&["run", "--rm", "committed:two", "cat", "/kept"])?, "kept");
    let fresh = docker.container();
    docker.ok(&["create", "--name", fresh.name(), "committed:two"])?;
    docker.ok(&["commit", fresh.name(), "committed:three"])?;
    let layers = |name: &str| docker.inspect(name, "{{len .RootFS.Layers}}");
    assert_eq!(layers("committed:three")?, layers("committed:two")?, "nothing makes no layer");
    let refused = docker.run(&["commit", "-c", "RUN x", container.name()])?;
    assert!(refused.code != 0 && refused.stderr.contains("not a valid change command"), "{}", refused.stderr);
    drop((container, fresh));
    for name in ["committed:three", "committed:two", "committed:one", "to-commit:it"] {
        docker.ok(&["rmi", name])?;
    }
    Ok(())
}

#[test]
fn an_exported_root_can_be_imported_and_run() -> Test {
    let suite = Suite::from_env()?;
    let docker = suite.docker();
    let container = docker.container();
    docker.ok(&["run", "--name", container.name(), "busybox", "sh", "-c", "echo x > /exported"])?;
    let archive = docker.run(&["export", container.name()])?;
    docker.run_with(&["import", "-c", "CMD cat /exported", "-", "imported:it"], archive.stdout)?.ok()?;
    assert_eq!(docker.ok(&["run", "--rm", "imported:it"])?, "x");
    docker.ok(&["rmi", "imported:it"])?;
    Ok(())
}
