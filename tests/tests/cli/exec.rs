//! More processes in a running container.

use bulkhead_tests::terminal::Terminal;

use crate::{Test, docker};

const SLEEP: &[&str] = &["busybox", "sleep", "1000"];

#[test]
fn exec_i_passes_stdin_and_its_end() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(SLEEP)?;
    let output = docker
        .run_with(&["exec", "-i", container.name(), "sh", "-c", "cat; echo end"], b"text\n".to_vec())?;
    assert_eq!(output.ok()?, "text\nend");
    Ok(())
}

#[test]
fn exec_s_code_is_its_program_s() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(SLEEP)?;
    let code =
        |words: &[&str]| docker.run(&[&["exec", container.name()], words].concat()).map(|output| output.code);
    assert_eq!(code(&["sh", "-c", "exit 9"])?, 9);
    assert_eq!(code(&["no-such-program"])?, 127);
    assert_eq!(code(&["/etc/not-executable"])?, 126);
    assert_eq!(docker.inspect(container.name(), "{{.State.Running}}")?, "true");
    Ok(())
}

#[test]
fn exec_sees_the_container_and_its_own_flags() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["-e", "OUTER=1", "-w", "/etc", "busybox", "sleep", "1000"])?;
    assert_eq!(container.exec(&["sh", "-c", "echo $OUTER; pwd; id -u"])?, "1\n/etc\n0");
    let name = container.name();
    let words = [
        "exec",
        "-e",
        "INNER=2",
        "-w",
        "/bin",
        "-u",
        "nobody",
        name,
        "sh",
        "-c",
        "echo $OUTER$INNER; pwd; id -u",
    ];
    assert_eq!(docker.ok(&words)?, "12\n/bin\n65534");
    assert!(container.exec(&["ps"])?.contains("sleep 1000"));
    Ok(())
}

#[test]
fn exec_it_is_a_terminal_that_follows_the_window_s_size() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(SLEEP)?;
    let mut terminal = Terminal::start(docker.command(&["exec", "-it", container.name(), "sh"]), 30, 90)?;
    // The prompt shows that the shell is there, hence that the first size has been sent.
    terminal.read_until("# ")?;
    terminal.type_text("tty\n")?;
    terminal.read_until("/dev/pts/")?;
    terminal.read_until("# ")?;
    // The CLI sends a new size on its own time: the shell waits for it.
    terminal.resize(41, 101)?;
    terminal.type_text("until [ \"$(stty size)\" = '41 101' ]; do sleep 0.1; done; echo size-$((40+1))\n")?;
    terminal.read_until("size-41")?;
    terminal.type_text("exit 4\n")?;
    assert_eq!(terminal.wait()?, 4);
    Ok(())
}

#[test]
fn the_keys_leave_a_terminal_and_the_process_goes_on() -> Test {
    let docker = docker()?;
    let container = docker.container();
    let name = container.name();
    let mut run = Terminal::start(docker.command(&["run", "-it", "--name", name, "busybox", "sh"]), 24, 80)?;
    run.read_until("# ")?;
    run.type_text("\u{10}\u{11}")?;
    assert_eq!(run.wait()?, 0);
    let attach = ["attach", "--detach-keys", "ctrl-x,y", name];
    let mut attached = Terminal::start(docker.command(&attach), 24, 80)?;
    attached.type_text("echo goes''-on\n")?;
    attached.read_until("goes-on")?;
    attached.type_text("\u{18}y")?;
    attached.wait()?;
    let mut exec = Terminal::start(docker.command(&["exec", "-it", name, "sh"]), 24, 80)?;
    exec.read_until("# ")?;
    exec.type_text("\u{10}\u{11}")?;
    exec.wait()?;
    assert_eq!(docker.inspect(name, "{{.State.Running}} {{len .ExecIDs}}")?, "true 1");
    let filters = ["event=detach", "event=exec_detach", &format!("container={name}")];
    let events = docker.events(&filters, "{{.Action}} {{.Actor.Attributes.name}}")?;
    assert_eq!(events, format!("detach {name}\ndetach {name}\nexec_detach {name}"));
    Ok(())
}

#[test]
fn run_it_is_a_terminal_and_its_code_comes_back() -> Test {
    let docker = docker()?;
    let mut terminal = Terminal::start(docker.command(&["run", "-it", "--rm", "busybox", "sh"]), 24, 80)?;
    terminal.read_until("# ")?;
    terminal.type_text("[ -t 0 ] && [ -t 1 ] && echo ter''minal\n")?;
    terminal.read_until("terminal")?;
    terminal.type_text("exit 6\n")?;
    assert_eq!(terminal.wait()?, 6);
    Ok(())
}

#[test]
fn ctrl_c_in_a_terminal_ends_what_runs_there() -> Test {
    let docker = docker()?;
    let words = ["run", "-it", "--rm", "--init", "busybox", "sh", "-c", "echo up; exec sleep 1000"];
    let mut terminal = Terminal::start(docker.command(&words), 24, 80)?;
    terminal.read_until("up")?;
    terminal.type_text("\u{3}")?;
    assert_eq!(terminal.wait()?, 130);
    Ok(())
}

#[test]
fn many_execs_at_once_do_not_mix() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(SLEEP)?;
    std::thread::scope(|scope| {
        let run = |number: usize| {
            let (docker, name) = (&docker, container.name());
            scope.spawn(move || docker.ok(&["exec", name, "sh", "-c", &format!("sleep 0.1; echo {number}")]))
        };
        let runs: Vec<_> = (0..10).map(run).collect();
        for (number, run) in runs.into_iter().enumerate() {
            assert_eq!(run.join().expect("no panic")?, number.to_string());
        }
        Ok(())
    })
}

#[test]
fn exec_in_a_stopped_container_is_refused() -> Test {
    let docker = docker()?;
    let container = docker.run_detached(&["busybox", "true"])?;
    container.docker(&["wait"])?;
    let output = docker.run(&["exec", container.name(), "true"])?;
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("is not running"), "{}", output.stderr);
    Ok(())
}

#[test]
fn orphans_are_reaped_and_do_not_change_the_workload_s_code() -> Test {
    let docker = docker()?;
    let script = "for i in 1 2 3 4 5 6 7 8; do (sh -c 'sleep 0.1; exit 3' &) ; done; sleep 1; exit 11";
    assert_eq!(docker.run(&["run", "--rm", "busybox", "sh", "-c", script])?.code, 11);
    Ok(())
}
