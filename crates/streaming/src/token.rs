//! The tokens in the URLs: random, for one use, for a short time, and so many at most.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use rustix::rand::{GetRandomFlags, getrandom};

/// Sessions that may wait for their client.
const MAX_PENDING: usize = 1000;

/// Why no URL could be made.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// For the CRI: ResourceExhausted.
    #[error("{MAX_PENDING} streaming requests wait for their clients already")]
    TooMany,
    /// The kernel gave no random bytes.
    #[error("random token: {0}")]
    Random(#[source] std::io::Error),
}

/// What waits under its token.
#[derive(Debug)]
pub(crate) struct Tokens<T> {
    life: Duration,
    pending: Mutex<Pending<T>>,
}

#[derive(Debug)]
struct Pending<T> {
    sessions: HashMap<String, T>,
    /// In the order of expiry. Used tokens stay here until then; they are refused as they are not among the sessions.
    expiry: VecDeque<(Instant, String)>,
}

impl<T> Tokens<T> {
    pub(crate) fn new(life: Duration) -> Self {
        Self { life, pending: Mutex::new(Pending { sessions: HashMap::new(), expiry: VecDeque::new() }) }
    }

    /// A new token of 128 random bits in base64url.
    pub(crate) fn insert(&self, session: T) -> Result<String, TokenError> {
        let mut bytes = [0_u8; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
                .map_err(|error| TokenError::Random(error.into()))?;
        }
        let token = URL_SAFE_NO_PAD.encode(bytes);
        let mut pending = self.pending();
        pending.expire();
        if pending.sessions.len() >= MAX_PENDING {
            return Err(TokenError::TooMany);
        }
        pending.sessions.insert(token.clone(), session);
        pending.expiry.push_back((Instant::now() + self.life, token.clone()));
        Ok(token)
    }

    /// The session of a token, once.
    pub(crate) fn take(&self, token: &str) -> Option<T> {
        let mut pending = self.pending();
        pending.expire();
        pending.sessions.remove(token)
    }

    /// Drops what nobody came for.
    pub(crate) fn expire(&self) {
        self.pending().expire();
    }

    fn pending(&self) -> MutexGuard<'_, Pending<T>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Pending<T> {
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some((_, token)) = self.expiry.pop_front_if(|(at, _)| *at <= now) {
            self.sessions.remove(&token);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, thread::sleep};

    use super::*;

    #[test]
    fn is_for_one_use() {
        let tokens = Tokens::new(Duration::from_secs(60));
        let token = tokens.insert(1).unwrap();
        assert_eq!(token.len(), 22);
        assert_eq!(tokens.take("AAAAAAAAAAAAAAAAAAAAAA"), None);
        assert_eq!(tokens.take(&token), Some(1));
        assert_eq!(tokens.take(&token), None);
    }

    #[test]
    fn expires() {
        let tokens = Tokens::new(Duration::from_millis(20));
        let token = tokens.insert(1).unwrap();
        sleep(Duration::from_millis(30));
        assert_eq!(tokens.take(&token), None);
        assert!(tokens.pending().expiry.is_empty());
    }

    #[test]
    fn so_many_at_most() {
        let tokens = Tokens::new(Duration::from_secs(60));
        let all: HashSet<_> = (0..MAX_PENDING).map(|n| tokens.insert(n).unwrap()).collect();
        assert_eq!(all.len(), MAX_PENDING);
        assert!(matches!(tokens.insert(0), Err(TokenError::TooMany)));
        tokens.take(all.iter().next().unwrap()).unwrap();
        tokens.insert(0).unwrap();
    }
}
