//! epoll with owned registrations.
//!
//! A [`Watched`] file descriptor leaves the epoll set before it is closed. That matters here: a child that
//! is being started shares our descriptors until its `execve`, so closing alone would leave the entry
//! alive, and report events for something that is gone.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, CreateFlags, EventData, EventFlags},
    },
    io::Errno,
};

/// How many events one wait takes.
const BATCH: usize = 64;

/// An epoll set whose entries carry a key of type `K`.
pub struct Poller<K> {
    epoll: OwnedFd,
    /// Numbers are never used again, so that an event in a batch cannot meet a successor of its source.
    next: Cell<u64>,
    keys: RefCell<BTreeMap<u64, K>>,
}

/// An event: whose, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready<K> {
    /// Whose.
    pub key: K,
    /// Reading will not block (there is data, an end or an error to be read).
    pub readable: bool,
    /// Writing will not block.
    pub writable: bool,
}

impl<K: Clone> Poller<K> {
    /// An empty set.
    pub fn new() -> io::Result<Rc<Self>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Rc::new(Self { epoll, next: Cell::new(0), keys: RefCell::default() }))
    }

    /// Takes a descriptor into the set's care; nothing is reported before [`Watched::want`].
    pub fn watch(self: &Rc<Self>, fd: OwnedFd, key: K) -> Watched<K> {
        let token = self.next.get();
        self.next.set(token + 1);
        self.keys.borrow_mut().insert(token, key);
        Watched { fd, token, wanted: Cell::new(EventFlags::empty()), poller: Rc::clone(self) }
    }

    /// Waits for events, at most `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<Ready<K>>> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        let mut events = Vec::with_capacity(BATCH);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let keys = self.keys.borrow();
        Ok(events
            .iter()
            .filter_map(|event| {
                let flags = event.flags;
                let failed = flags.intersects(EventFlags::ERR | EventFlags::HUP);
                Some(Ready {
                    key: keys.get(&event.data.u64())?.clone(),
                    readable: failed
                        || flags.intersects(EventFlags::IN | EventFlags::PRI | EventFlags::RDHUP),
                    writable: failed || flags.intersects(EventFlags::OUT),
                })
            })
            .collect())
    }
}

/// A descriptor in a [`Poller`]'s care.
pub struct Watched<K> {
    fd: OwnedFd,
    token: u64,
    wanted: Cell<EventFlags>,
    poller: Rc<Poller<K>>,
}

impl<K> Watched<K> {
    /// Says what to report from now on, level-triggered. With neither, not even a hang-up is reported:
    /// epoll would report it again and again to someone who has no use for it.
    pub fn want(&self, readable: bool, writable: bool) -> io::Result<()> {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, readable);
        flags.set(EventFlags::OUT, writable);
        self.want_flags(flags)
    }

    /// Reports changes of a kernel file that signals them as exceptional (cgroup event files).
    pub fn want_changes(&self) -> io::Result<()> {
        self.want_flags(EventFlags::PRI)
    }

    fn want_flags(&self, flags: EventFlags) -> io::Result<()> {
        let before = self.wanted.get();
        if flags == before {
            return Ok(());
        }
        let data = EventData::new_u64(self.token);
        if flags.is_empty() {
            epoll::delete(&self.poller.epoll, &self.fd)?;
        } else if before.is_empty() {
            epoll::add(&self.poller.epoll, &self.fd, data, flags)?;
        } else {
            epoll::modify(&self.poller.epoll, &self.fd, data, flags)?;
        }
        self.wanted.set(flags);
        Ok(())
    }
}

impl<K> AsFd for Watched<K> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<K> Drop for Watched<K> {
    fn drop(&mut self) {
        // An error means that it was not in the set.
        let _ = self.want_flags(EventFlags::empty());
        self.poller.keys.borrow_mut().remove(&self.token);
    }
}

#[cfg(test)]
mod tests {
    use rustix::{io::write, pipe::pipe};

    use super::*;

    #[test]
    fn a_dropped_descriptor_reports_nothing_though_a_copy_lives() {
        let poller = Poller::new().unwrap();
        let (reader, writer) = pipe().unwrap();
        let copy = reader.try_clone().unwrap();
        let watched = poller.watch(reader, 'a');
        watched.want(true, false).unwrap();
        write(&writer, b"x").unwrap();
        let ready = poller.wait(Some(Duration::ZERO)).unwrap();
        assert_eq!(ready, [Ready { key: 'a', readable: true, writable: false }]);
        drop(watched);
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
        drop(copy);
    }

    #[test]
    fn a_hang_up_is_silent_when_nothing_is_wanted() {
        let poller = Poller::new().unwrap();
        let (reader, writer) = pipe().unwrap();
        let watched = poller.watch(reader, 'a');
        watched.want(true, false).unwrap();
        drop(writer);
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap().len(), 1);
        watched.want(false, false).unwrap();
        assert_eq!(poller.wait(Some(Duration::ZERO)).unwrap(), []);
    }
}
