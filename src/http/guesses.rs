//! Questions of clients that show no token, of which an address may get so many wrong.
//!
//! Such a question costs work, as reading a list of tokens does. Whoever asks what is of no use again and
//! again waits, and what that costs is bounded; whoever asks about valid tokens does not notice. Accounts'
//! passwords are guarded by their sessions, not here.

use std::{net::IpAddr, time::Duration};

use super::reply::Failure;
use crate::throttle::{Buckets, Rate, origin};

/// What an address may get wrong: an edge that forwards a flood of made-up tokens, ten questions a second,
/// stays below.
const RATE: Rate = Rate { burst: 200, every: Duration::from_millis(50) };

/// How much each address has got wrong.
#[derive(Debug)]
pub struct Guesses(Buckets<IpAddr>);

impl Default for Guesses {
    fn default() -> Self {
        Self(Buckets::new(RATE))
    }
}

impl Guesses {
    /// Answers a question of `client`, unless it has got too much wrong; `answer` tells whether it has this time
    /// as well.
    ///
    /// # Errors
    /// Those of `answer`, which count as wrong, also where nothing can be told at the moment; and too many.
    pub async fn answer<T>(
        &self,
        client: IpAddr,
        answer: impl Future<Output = Result<Guess<T>, Failure>>,
    ) -> Result<T, Failure> {
        let origin = origin(client);
        self.0.take(&origin).map_err(Failure::Throttled)?;
        let answer = answer.await;
        if matches!(answer, Ok(Guess::Right(_))) {
            self.0.give_back(&origin);
        }
        answer.map(|(Guess::Right(answer) | Guess::Wrong(answer))| answer)
    }
}

/// An answer to a guess.
#[derive(Debug)]
pub enum Guess<T> {
    /// It was of use.
    Right(T),
    /// It was not.
    Wrong(T),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn wrong_guesses_wait_and_right_ones_do_not() {
        let (guesses, client) = (Guesses::default(), IpAddr::from([192, 0, 2, 7]));
        let ask = async |client, guess| guesses.answer(client, async { guess }).await;
        for _ in 0..2 * RATE.burst {
            ask(client, Ok(Guess::Right(()))).await.unwrap();
        }
        for _ in 0..RATE.burst {
            ask(client, Ok(Guess::Wrong(()))).await.unwrap();
        }
        let refused = ask(client, Ok(Guess::Right(()))).await;
        assert!(matches!(refused, Err(Failure::Throttled(_))), "{refused:?}");
        ask(IpAddr::from([192, 0, 2, 8]), Ok(Guess::Wrong(()))).await.unwrap();
        tokio::time::advance(RATE.every).await;
        let failed = ask(client, Err(Failure::MediaType)).await;
        assert!(matches!(failed, Err(Failure::MediaType)), "{failed:?}");
        let refused = ask(client, Ok(Guess::Right(()))).await;
        assert!(matches!(refused, Err(Failure::Throttled(_))), "what is no question counts");
    }
}
