//! Log lines that a peer can cause as often as it likes.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

const PAUSE: Duration = Duration::from_secs(1);

/// Lets one line of a kind through in a second, and counts the others.
#[derive(Debug)]
pub struct Throttle(Mutex<State>);

#[derive(Debug)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl Throttle {
    /// The first line may be written at once. Fit for a `static`.
    pub const fn new() -> Self {
        Throttle(Mutex::new(State {
            last: None,
            suppressed: 0,
        }))
    }

    /// At most once a second: write the line, and with it how many were
    /// suppressed since the last one.
    pub fn permit(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if state.last.is_some_and(|last| now - last < PAUSE) {
            state.suppressed += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

impl Default for Throttle {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_line_a_second_and_the_others_are_counted() {
        static THROTTLE: Throttle = Throttle::new();
        assert_eq!(THROTTLE.permit(), Some(0));
        for _ in 0..1000 {
            assert_eq!(THROTTLE.permit(), None);
        }
        tokio::time::advance(PAUSE / 2).await;
        assert_eq!(THROTTLE.permit(), None);
        tokio::time::advance(PAUSE / 2).await;
        assert_eq!(THROTTLE.permit(), Some(1001));
        tokio::time::advance(PAUSE).await;
        assert_eq!(THROTTLE.permit(), Some(0));
    }
}
