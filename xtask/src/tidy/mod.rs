//! Boundaries and habits that no compiler checks. Each rule is a line of [`RULES`] or a function here; what it finds
//! is printed as `file:line: why`.

mod source;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use self::source::{Line, Source};
use crate::sh;
use crate::tree::Tree;

/// A file longer than this holds more than one room.
const MAX_LINES: usize = 900;

/// Words that must not occur in the code (comments and strings aside) of some files.
struct Boundary {
    /// Path prefixes from the top of the tree.
    within: &'static [&'static str],
    except: &'static [&'static str],
    /// Paths as code writes them, e.g. `crate::sandbox`.
    forbidden: &'static [&'static str],
    why: &'static str,
}

const BOUNDARIES: &[Boundary] = &[
    Boundary {
        within: &["daemon/src/api/"],
        except: &[],
        forbidden: &["crate::sandbox", "bulkhead_vmm", "bulkhead_agent", "kvm_ioctls", "kvm_bindings"],
        why: "the API is the Docker contract and knows no microVMs",
    },
    Boundary {
        within: &["daemon/src/engine/"],
        except: &["daemon/src/engine/image/"],
        forbidden: &[
            "hyper",
            "hyper_util",
            "http",
            "http_body_util",
            "kvm_ioctls",
            "kvm_bindings",
            "bulkhead_vmm_api",
        ],
        why: "the engine owns containers and knows neither HTTP nor KVM",
    },
    Boundary {
        // Its registry client speaks HTTP outwards.
        within: &["daemon/src/engine/image/"],
        except: &[],
        forbidden: &["kvm_ioctls", "kvm_bindings", "bulkhead_vmm_api", "crate::sandbox"],
        why: "images have nothing to do with machines",
    },
    Boundary {
        within: &["daemon/src/sandbox/"],
        except: &[],
        forbidden: &["crate::api", "hyper", "hyper_util", "http"],
        why: "a sandbox is driven by the engine and knows no Docker API",
    },
    Boundary {
        within: &["daemon/src/hostnet/"],
        except: &[],
        forbidden: &["crate::api", "crate::engine", "crate::sandbox", "hyper", "hyper_util", "http"],
        why: "the host's network is told what there is to be, and knows no containers",
    },
    Boundary {
        within: &["daemon/src/api/", "daemon/src/engine/", "daemon/src/sandbox/"],
        except: &[],
        forbidden: &["bulkhead_netlink"],
        why: "bridges, taps and rules are hostnet's",
    },
    Boundary {
        within: &["vmm/src/"],
        except: &[
            "vmm/src/machine/",
            "vmm/src/machine.rs",
            "vmm/src/arch/",
            "vmm/src/arch.rs",
            "vmm/src/main.rs",
        ],
        forbidden: &["kvm_ioctls", "kvm_bindings"],
        why: "KVM stops at vmm/src/machine and vmm/src/arch",
    },
    Boundary {
        within: &["vmm/src/devices/"],
        except: &[],
        forbidden: &["crate::machine", "crate::arch", "bulkhead_vmm::machine"],
        why: "a device knows no machine",
    },
    Boundary {
        within: &["vmm/src/", "guest-agent/src/", "rootfs-builder/src/"],
        except: &["vmm/src/main.rs", "guest-agent/src/main.rs", "rootfs-builder/src/main.rs"],
        forbidden: &["anyhow"],
        why: "libraries have typed errors; anyhow is for main.rs",
    },
];

/// Pieces of paths that only the machine of whoever wrote them has. Put together here so that this file passes.
const MACHINE_PATHS: &[&str] = &[concat!("/ro", "ot/."), concat!("/wo", "rk/"), concat!("/tm", "p/k/")];

/// Calls that take paths or names, as code writes them: a VMM has descriptors.
const PATH_CALLS: &[&str] = &[
    "fs::read(",
    "fs::write(",
    "fs::read_to_string(",
    "fs::read_dir(",
    "fs::metadata(",
    "fs::create_dir",
    "fs::remove_",
    "fs::open(",
    "fs::openat(",
    "File::open(",
    "File::create",
    "OpenOptions",
    "UnixStream::connect",
    "UnixListener::bind",
    "TcpStream",
    "TcpListener",
    "process::Command",
    "Kvm::new",
    "libc::open(",
];

/// Unfinished work.
const STUBS: &[&str] =
    &[concat!("todo", "!("), concat!("unimplemented", "!("), concat!("FIX", "ME"), concat!("XX", "X:")];

pub(crate) fn run(tree: &Tree) -> Result<()> {
    let findings = check(tree)?;
    for finding in &findings {
        println!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        1 => bail!("tidy: 1 finding"),
        count => bail!("tidy: {count} findings"),
    }
}

fn check(tree: &Tree) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for path in tracked_files(tree)? {
        let Ok(text) = fs::read_to_string(tree.root().join(&path)) else { continue };
        let name = path.display().to_string();
        machine_paths(&name, &text, &mut findings);
        if path.extension().is_some_and(|extension| extension == "rs") {
            let source = Source::parse(&text);
            long_file(&name, &text, &mut findings);
            boundaries(&name, &source, &mut findings);
            paths_in_the_vmm(&name, &source, &mut findings);
            stubs(&name, &source, &mut findings);
            unsafe_without_reason(&name, &source, &mut findings);
        }
        if path.file_name().is_some_and(|file| file == "Cargo.toml") && path.components().count() > 1 {
            versions_outside_the_workspace(&name, &text, &mut findings);
        }
    }
    Ok(findings)
}

/// What git tracks, or would track if asked.
fn tracked_files(tree: &Tree) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.current_dir(tree.root()).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = sh::output(&mut git)?;
    Ok(list.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect())
}

fn long_file(name: &str, text: &str, findings: &mut Vec<String>) {
    let lines = text.lines().count();
    if lines > MAX_LINES {
        findings.push(format!("{name}:1: {lines} lines, over {MAX_LINES}: split it"));
    }
}

fn boundaries(name: &str, source: &Source, findings: &mut Vec<String>) {
    let starts = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
    for boundary in BOUNDARIES.iter().filter(|b| starts(b.within) && !starts(b.except)) {
        for line in &source.lines {
            if let Some(word) = boundary.forbidden.iter().find(|word| mentions(&line.code, word)) {
                findings.push(format!("{name}:{}: {word}: {}", line.number, boundary.why));
            }
        }
    }
}

/// Paths in a VMM, its tests aside.
fn paths_in_the_vmm(name: &str, source: &Source, findings: &mut Vec<String>) {
    // What drives devices for a fuzzer is no part of the VMM; the share server is a process of its own, whose root is
    // empty, and resolves names in its shares.
    let others = ["vmm/src/fuzzing/", "vmm/src/shares/"];
    if !name.starts_with("vmm/src/")
        || others.iter().any(|other| name.starts_with(other))
        || name.contains("test")
    {
        return;
    }
    let product = source.lines.iter().take_while(|line| line.code.trim() != "#[cfg(test)]");
    for line in product {
        if let Some(call) = PATH_CALLS.iter().find(|call| line.code.contains(*call)) {
            findings.push(format!("{name}:{}: {call}: a VMM uses the descriptors it was given", line.number));
        }
    }
}

/// Does the code use this path, i.e. is it there between characters that are not part of a name, and, for a crate's
/// name, followed by `::` or `;`?
fn mentions(code: &str, word: &str) -> bool {
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + word.len()..];
        let is_name = |c: char| c.is_alphanumeric() || c == '_';
        let starts = before.is_none_or(|c| !is_name(c) && c != ':' && c != '.');
        let ends = if word.contains("::") {
            after.chars().next().is_none_or(|c| !is_name(c))
        } else {
            after.starts_with("::") || (code.trim_start().starts_with("use ") && after.starts_with(';'))
        };
        starts && ends
    })
}

fn stubs(name: &str, source: &Source, findings: &mut Vec<String>) {
    for line in &source.lines {
        if let Some(stub) =
            STUBS.iter().find(|stub| line.code.contains(*stub) || line.comment.contains(*stub))
        {
            findings.push(format!("{name}:{}: {stub}: finish it, or refuse with a clear error", line.number));
        }
    }
}

/// Clippy asks for it at blocks; this asks at `unsafe impl`, `unsafe fn` and `unsafe extern` too.
fn unsafe_without_reason(name: &str, source: &Source, findings: &mut Vec<String>) {
    for (index, line) in source.lines.iter().enumerate() {
        if !line.has_word("unsafe") || line.has_word("unsafe_code") {
            continue;
        }
        let reason = |line: &Line| line.comment.contains("SAFETY:") || line.comment.contains("# Safety");
        let earlier = source.lines.get(..index).unwrap_or_default().iter().rev();
        // The comment stands above the statement, whose first lines and attributes may come between.
        let near = earlier.take(12).take_while(|line| !line.code.trim_end().ends_with('}'));
        if !reason(line) && !near.into_iter().any(reason) {
            findings.push(format!("{name}:{}: unsafe without a SAFETY comment", line.number));
        }
    }
}

fn machine_paths(name: &str, text: &str, findings: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        if let Some(path) = MACHINE_PATHS.iter().find(|path| line.contains(*path)) {
            findings.push(format!("{name}:{}: {path}: a path of somebody's machine", number + 1));
        }
    }
}

/// Versions stand in one place, the workspace's manifest.
fn versions_outside_the_workspace(name: &str, text: &str, findings: &mut Vec<String>) {
    let Ok(manifest) = text.parse::<toml::Table>() else {
        findings.push(format!("{name}:1: not TOML"));
        return;
    };
    // A fuzz crate is a workspace of its own.
    if manifest.contains_key("workspace") {
        return;
    }
    for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
        let Some(dependencies) = manifest.get(section).and_then(toml::Value::as_table) else { continue };
        for (dependency, spec) in dependencies {
            let inherited = spec.get("workspace").and_then(toml::Value::as_bool) == Some(true);
            if !inherited {
                findings.push(format!("{name}:1: {dependency}: say `workspace = true`"));
            }
        }
    }
}

/// The findings of one file, for tests.
#[cfg(test)]
fn check_text(path: &std::path::Path, text: &str) -> Vec<String> {
    let (name, source, mut findings) = (path.display().to_string(), Source::parse(text), Vec::new());
    boundaries(&name, &source, &mut findings);
    paths_in_the_vmm(&name, &source, &mut findings);
    stubs(&name, &source, &mut findings);
    unsafe_without_reason(&name, &source, &mut findings);
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(path: &str, text: &str) -> usize {
        check_text(std::path::Path::new(path), text).len()
    }

    #[test]
    fn a_crossed_boundary_is_found_and_a_comment_about_it_is_not() {
        assert_eq!(findings("daemon/src/api/x.rs", "use crate::sandbox::Vmm;\n"), 1);
        assert_eq!(
            findings("daemon/src/api/x.rs", "// crate::sandbox is not for us\nlet a = \"kvm_ioctls::X\";\n"),
            0
        );
        assert_eq!(findings("vmm/src/bus.rs", "fn f(vm: &kvm_ioctls::VmFd) {}\n"), 1);
        assert_eq!(findings("vmm/src/machine/vcpu.rs", "use kvm_ioctls::VcpuFd;\n"), 0);
        assert_eq!(findings("daemon/src/engine/x.rs", "let http = 1; self.http::<u8>();\n"), 0);
        assert_eq!(findings("daemon/src/engine/x.rs", "use http::StatusCode;\n"), 1);
    }

    #[test]
    fn a_vmm_opens_no_path_but_its_tests_do() {
        let open = "fn f() { File::open(path) }\n";
        assert_eq!(findings("vmm/src/bus.rs", open), 1);
        assert_eq!(findings("vmm/src/bus.rs", &format!("#[cfg(test)]\nmod tests {{ {open} }}\n")), 0);
        assert_eq!(findings("vmm/src/devices/virtio/fs/tests/mod.rs", open), 0);
        assert_eq!(findings("daemon/src/x.rs", open), 0);
    }

    #[test]
    fn unsafe_needs_a_reason_close_by() {
        assert_eq!(findings("a.rs", "fn f() {\n    unsafe { g() }\n}\n"), 1);
        assert_eq!(findings("a.rs", "    // SAFETY: g is harmless.\n    unsafe { g() }\n"), 0);
        assert_eq!(findings("a.rs", "// SAFETY: plain data.\nunsafe impl Send for X {}\n"), 0);
        assert_eq!(findings("a.rs", "unsafe impl Send for X {}\n"), 1);
        assert_eq!(findings("a.rs", "let s = \"unsafe\"; // unsafe words\n"), 0);
    }

    #[test]
    fn versions_belong_to_the_workspace() {
        let mut findings = Vec::new();
        versions_outside_the_workspace(
            "x/Cargo.toml",
            "[dependencies]\na = \"1\"\nb.workspace = true\nc = { workspace = true, features = [\"d\"] }\n",
            &mut findings,
        );
        assert_eq!(findings.len(), 1, "{findings:?}");
    }
}
