//! A container's files, in and out: copies, changes, images made of them, and archives of images.

mod archives;
mod commit;
mod copy;
mod images;
mod local;

/// An error fails the test, with its whole story.
type Test = anyhow::Result<()>;
