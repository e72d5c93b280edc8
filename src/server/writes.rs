//! When what a connection has to send has left.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

/// What a connection has written.
///
/// hyper writes whatever is queued on a connection, and then flushes it. So what
/// is queued at one moment has left when a flush has ended later, and nothing
/// was written since: the connection had no more to write. A connection and its
/// calls are on one thread, so whoever waits here looks when the connection has
/// done what it could, and not in the middle of it.
#[derive(Debug, Default)]
pub(super) struct Writes {
    flushes: AtomicU64,
    /// Something was written since the last flush.
    is_dirty: AtomicBool,
    flushed: Notify,
}

impl Writes {
    /// Something is written.
    pub(super) fn written(&self) {
        self.is_dirty.store(true, Ordering::Release);
    }

    /// All that was written has left.
    pub(super) fn flushed(&self) {
        self.is_dirty.store(false, Ordering::Release);
        self.flushes.fetch_add(1, Ordering::AcqRel);
        self.flushed.notify_waiters();
    }

    /// Waits until what is queued when this is first polled has left.
    pub(super) async fn all_left(&self) {
        let before = self.flushes.load(Ordering::Acquire);
        loop {
            let flushed = self.flushed.notified();
            let has_flushed = self.flushes.load(Ordering::Acquire) > before;
            if has_flushed && !self.is_dirty.load(Ordering::Acquire) {
                return;
            }
            flushed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    #[test]
    fn what_is_queued_has_left_after_the_next_flush_that_is_the_last() {
        let writes = Writes::default();
        let mut context = Context::from_waker(Waker::noop());
        writes.written();
        writes.flushed();

        let mut left = pin!(writes.all_left());
        assert_eq!(left.as_mut().poll(&mut context), Poll::Pending);
        writes.written();
        assert_eq!(left.as_mut().poll(&mut context), Poll::Pending);
        writes.flushed(); // because the buffer was full: more follows
        writes.written();
        assert_eq!(left.as_mut().poll(&mut context), Poll::Pending);
        writes.flushed();
        assert_eq!(left.as_mut().poll(&mut context), Poll::Ready(()));
    }
}
