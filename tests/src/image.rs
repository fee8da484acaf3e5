//! Images made by hand, byte for byte the same each time: a busybox image needs no network and no build tool.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// An image in its registry form.
#[derive(Debug, Clone)]
pub struct Image {
    layers: Vec<Layer>,
    /// `config` of the image's configuration: `Cmd`, `Env`…
    run: Value,
}

/// A layer: a tar, and its gzip.
#[derive(Debug, Clone)]
pub struct Layer {
    tar: Vec<u8>,
    gzip: Vec<u8>,
}

/// Bytes that a registry holds under their digest.
#[derive(Debug, Clone, Copy)]
pub struct Blob<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
}

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

impl Image {
    /// An image of these layers, the lowest first.
    #[must_use]
    pub fn new(layers: Vec<Layer>, run: Value) -> Image {
        Image { layers, run }
    }

    /// The machine's static busybox with a link for each applet, and the few files that programs expect.
    ///
    /// # Errors
    /// When `/bin/busybox` is not there (package busybox-static).
    pub fn busybox() -> Result<Image> {
        let program = Path::new("/bin/busybox");
        let bytes = std::fs::read(program).context("read /bin/busybox (package busybox-static)")?;
        let applets = Command::new(program).arg("--list").output()?.stdout;
        let mut layer = LayerBuilder::new();
        for dir in ["bin", "dev", "etc", "home", "proc", "root", "sys", "usr", "usr/bin", "var"] {
            layer.directory(dir, 0o755)?;
        }
        layer.directory("tmp", 0o1777)?;
        layer.file("bin/busybox", 0o755, &bytes)?;
        for applet in String::from_utf8(applets)?.lines().filter(|name| *name != "busybox") {
            layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
        }
        layer.file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n",
        )?;
        layer.file("etc/group", 0o644, b"root:x:0:\nwheel:x:10:nobody\nnogroup:x:65534:\n")?;
        layer.file("etc/not-executable", 0o644, b"#!/bin/sh\n")?;
        let run = json!({"Cmd": ["sh"], "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]});
        Ok(Image::new(vec![layer.finish()?], run))
    }

    /// Sets a field of what it says about running it: `Volumes`, `User`…
    pub fn set(&mut self, field: &str, value: Value) {
        self.run[field] = value;
    }

    /// Something like Alpine Linux: the directories and users of it that clients' own tests look for.
    ///
    /// # Errors
    /// As [`Image::busybox`].
    pub fn like_alpine() -> Result<Image> {
        let mut layer = LayerBuilder::new();
        for dir in [
            "media",
            "mnt",
            "opt",
            "run",
            "srv",
            "usr/local",
            "usr/sbin",
            "var/cache",
            "var/lib",
            "var/log",
            "var/opt",
        ] {
            layer.directory(dir, 0o755)?;
        }
        layer.file(
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\npostgres:x:70:70::/var/lib/postgresql:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        )?;
        layer.file(
            "etc/group",
            0o644,
            b"root:x:0:root\nwheel:x:10:root\npostgres:x:70:\nnobody:x:65534:\n",
        )?;
        layer.file("etc/alpine-release", 0o644, b"3.10.0\n")?;
        Ok(Image::busybox()?.with_layer(layer.finish()?).with_command(&["/bin/sh"]))
    }

    /// This image with another command.
    #[must_use]
    pub fn with_command(&self, words: &[&str]) -> Image {
        let mut image = self.clone();
        image.run["Cmd"] = json!(words);
        image
    }

    /// This image with one more layer on top.
    #[must_use]
    pub fn with_layer(&self, layer: Layer) -> Image {
        let mut image = self.clone();
        image.layers.push(layer);
        image
    }

    /// The configuration, whose digest is the image's id.
    #[must_use]
    pub fn config(&self) -> Vec<u8> {
        let diff_ids = self.diff_ids();
        let history: Vec<Value> =
            self.layers.iter().map(|_| json!({"created": "2024-01-01T00:00:00Z"})).collect();
        json!({
            "architecture": "amd64",
            "os": "linux",
            "created": "2024-01-01T00:00:00Z",
            "config": self.run,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
        })
        .to_string()
        .into_bytes()
    }

    /// The digests of its layers' archives.
    #[must_use]
    pub fn diff_ids(&self) -> Vec<String> {
        self.layers.iter().map(|layer| digest(&layer.tar)).collect()
    }

    /// The image's id.
    #[must_use]
    pub fn id(&self) -> String {
        digest(&self.config())
    }

    /// Everything that the manifest refers to.
    #[must_use]
    pub fn layers(&self) -> Vec<Blob<'_>> {
        self.layers.iter().map(|layer| Blob { bytes: &layer.gzip }).collect()
    }

    /// The manifest and its media type.
    #[must_use]
    pub fn manifest(&self) -> (Vec<u8>, &'static str) {
        let config = self.config();
        let layer = |blob: Blob<'_>| {
            json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": blob.digest(),
                "size": blob.bytes.len(),
            })
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config),
                "size": config.len(),
            },
            "layers": self.layers().into_iter().map(layer).collect::<Vec<_>>(),
        });
        (manifest.to_string().into_bytes(), MANIFEST_TYPE)
    }

    /// What `docker save` would write, for `docker load`.
    ///
    /// # Errors
    /// Never, but for memory.
    pub fn archive(&self, reference: &str) -> Result<Vec<u8>> {
        let mut archive = LayerBuilder::new();
        let config_name = format!("{}.json", self.id().trim_start_matches("sha256:"));
        archive.file(&config_name, 0o644, &self.config())?;
        let mut names = Vec::new();
        for layer in &self.layers {
            let dir = digest(&layer.tar).trim_start_matches("sha256:").to_owned();
            archive.directory(&dir, 0o755)?;
            archive.file(&format!("{dir}/layer.tar"), 0o644, &layer.tar)?;
            names.push(format!("{dir}/layer.tar"));
        }
        let manifest = json!([{"Config": config_name, "RepoTags": [reference], "Layers": names}]);
        archive.file("manifest.json", 0o644, manifest.to_string().as_bytes())?;
        Ok(archive.builder.into_inner()?)
    }
}

impl Blob<'_> {
    /// Its name in a registry.
    #[must_use]
    pub fn digest(&self) -> String {
        digest(self.bytes)
    }
}

/// Writes a layer entry by entry.
pub struct LayerBuilder {
    builder: Builder<Vec<u8>>,
}

impl LayerBuilder {
    /// An empty layer.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "an empty layer is a beginning, not a value")]
    pub fn new() -> LayerBuilder {
        LayerBuilder { builder: Builder::new(Vec::new()) }
    }

    /// A directory.
    ///
    /// # Errors
    /// When the name is too long.
    pub fn directory(&mut self, name: &str, mode: u32) -> Result<()> {
        self.append(&format!("{name}/"), EntryType::Directory, mode, None, &[])
    }

    /// A regular file.
    ///
    /// # Errors
    /// When the name is too long.
    pub fn file(&mut self, name: &str, mode: u32, contents: &[u8]) -> Result<()> {
        self.append(name, EntryType::Regular, mode, None, contents)
    }

    /// Another name of a file that is in the layer.
    ///
    /// # Errors
    /// When a name is too long.
    pub fn hard_link(&mut self, name: &str, to: &str) -> Result<()> {
        self.append(name, EntryType::Link, 0o755, Some(to), &[])
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// When a name is too long.
    pub fn symlink(&mut self, name: &str, to: &str) -> Result<()> {
        self.append(name, EntryType::Symlink, 0o777, Some(to), &[])
    }

    /// An entry whose name is written as it is, `..` and all: what a hostile layer holds.
    ///
    /// # Errors
    /// When the name is over 100 bytes.
    pub fn raw_name(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        let mut header = header(EntryType::Regular, 0o644, contents.len());
        let field = &mut header.as_old_mut().name;
        field.get_mut(..name.len()).context("name too long")?.copy_from_slice(name.as_bytes());
        header.set_cksum();
        Ok(self.builder.append(&header, contents)?)
    }

    /// The layer.
    ///
    /// # Errors
    /// Never, but for memory.
    pub fn finish(self) -> Result<Layer> {
        let tar = self.builder.into_inner()?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&tar)?;
        Ok(Layer { gzip: gzip.finish()?, tar })
    }

    fn append(
        &mut self,
        name: &str,
        kind: EntryType,
        mode: u32,
        link: Option<&str>,
        contents: &[u8],
    ) -> Result<()> {
        let mut header = header(kind, mode, contents.len());
        match link {
            Some(link) => self.builder.append_link(&mut header, name, link)?,
            None => self.builder.append_data(&mut header, name, contents)?,
        }
        Ok(())
    }
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_704_067_200);
    header.set_size(size as u64);
    header
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Image {
        let mut layer = LayerBuilder::new();
        layer.file("a", 0o644, b"x").unwrap();
        layer.hard_link("b", "a").unwrap();
        Image::new(vec![layer.finish().unwrap()], json!({}))
    }

    #[test]
    fn the_same_image_twice_has_the_same_id() {
        assert_eq!(small().id(), small().id());
        assert_eq!(small().manifest().0, small().manifest().0);
    }

    #[test]
    fn the_manifest_names_blobs_by_their_digest() {
        let image = small();
        let manifest: Value = serde_json::from_slice(&image.manifest().0).unwrap();
        assert_eq!(manifest["config"]["digest"], image.id());
        assert_eq!(manifest["layers"][0]["digest"], image.layers()[0].digest());
    }

    #[test]
    fn hostile_names_stay_as_given() {
        let mut layer = LayerBuilder::new();
        layer.raw_name("../escaped", b"x").unwrap();
        let layer = layer.finish().unwrap();
        let mut archive = tar::Archive::new(layer.tar.as_slice());
        let names: Vec<_> =
            archive.entries().unwrap().map(|e| e.unwrap().path_bytes().into_owned()).collect();
        assert_eq!(names, [b"../escaped"]);
    }
}
