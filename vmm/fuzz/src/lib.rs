//! Every fuzz target of the project, by name, with its stored corpus in `corpus/<target>/`.
//!
//! ```text
//!  cargo nextest run -p bulkhead-fuzz      each target: its corpus, then random changes of it, for some seconds
//!  cargo xtask fuzz TARGET                 one target in libFuzzer, for as long as is wanted
//! ```
//!
//! Targets of the VMM are in `bulkhead_vmm::fuzzing`; here are those of the other programs' inputs.

use std::path::PathBuf;
use std::sync::OnceLock;

use bulkhead_agent_api::{FromAgent, Hello, StreamOpen, StreamReady, ToAgent, frame};
use bulkhead_rootfs::layers::{LayerStore, Limits};
use bulkhead_vmm::fuzzing::Target;

mod api;
pub mod mutate;

/// The directory of stored corpora.
#[must_use]
pub fn corpora() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// All targets by name.
pub fn targets() -> impl Iterator<Item = (&'static str, Target)> {
    let others: [(&str, Target); 2] = [("agent_frames", agent_frames), ("layer", layer)];
    bulkhead_vmm::fuzzing::TARGETS.iter().copied().chain(others).chain(api::TARGETS)
}

/// What a guest says in its agent's name: any bytes as every kind of frame.
fn agent_frames(bytes: &[u8]) {
    let mut rest = bytes;
    while let Ok(Some((message, used))) = frame::decode::<FromAgent>(rest) {
        let again = frame::encode(&message).expect("its own message");
        let (decoded, _) = frame::decode::<FromAgent>(&again).expect("its own frame").expect("a whole frame");
        assert_eq!(decoded, message);
        rest = rest.get(used..).unwrap_or_default();
    }
    let _ = frame::decode::<Hello>(bytes);
    let _ = frame::decode::<StreamOpen>(bytes);
    let _ = frame::decode::<StreamReady>(bytes);
    // And what a compromised daemon would say to the agent.
    let _ = frame::decode::<ToAgent>(bytes);
}

/// A layer of an image: any bytes as an archive, plain or compressed.
fn layer(bytes: &[u8]) {
    static STORE: OnceLock<(tempfile::TempDir, LayerStore)> = OnceLock::new();
    let (_, store) = STORE.get_or_init(|| {
        let below_target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target");
        let dir = [std::env::temp_dir(), below_target]
            .iter()
            .find_map(|parent| tempfile::tempdir_in(parent).ok())
            .expect("a temporary directory");
        let store = LayerStore::open(dir.path().join("store")).expect("a store");
        (dir, store)
    });
    let limits = Limits { stream_bytes: 1 << 20, entries: 1000 };
    if let Ok(info) = store.import(bytes, &limits) {
        store.remove(&info.diff_id).expect("removed");
    }
}
