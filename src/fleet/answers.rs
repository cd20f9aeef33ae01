//! Answers that the instances of a fleet share, so that only one of them asks upstream: for a first-seen
//! token, whether it is valid.
//!
//! The first instance claims the question for a few seconds. The others wait for its answer, and ask
//! themselves if there is none in time: the caller limits how long. While Redis fails, every instance asks.
//!
//! This module knows digests and opaque answers. It stores both with an expiry.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use redis::Script;
use tokio::time::Instant;

use super::{hub::Hub, lua};
use crate::{
    redis_client::{RedisClient, millis},
    token::TokenDigest,
};

/// How long a claim excludes other instances.
const CLAIM_DURATION: Duration = Duration::from_secs(3);

/// The longest that Redis delays a question.
const REQUEST_TIMEOUT: Duration = Duration::from_millis(500);

const FUNCTIONS: &str = r"
local function found(key)
  local stored = redis.call('HMGET', key, 'claim', 'answer', 'asked')
  local age = stored[2] and age_since(stored[3])
  if age then
    return {'answer', stored[2], age}
  elseif stored[1] then
    return {'claimed', '', 0}
  end
end
";

/// `KEYS`: the questions. `ARGV`: instance, duration of a claim in ms.
const CLAIM: &str = r"
local result = {}
for n, key in ipairs(KEYS) do
  result[n] = found(key)
  if not result[n] then
    redis.call('HSET', key, 'claim', ARGV[1])
    redis.call('PEXPIRE', key, ARGV[2])
    result[n] = {'open', '', 0}
  end
end
return result
";

/// `KEYS`: the questions. `ARGV`: instance. Changes nothing.
const LOOK: &str = r"
local result = {}
for n, key in ipairs(KEYS) do
  result[n] = found(key) or {'open', '', 0}
end
return result
";

/// `KEYS`: the questions. `ARGV`: the age of the answers in ms; for each the answer, and its duration in ms,
/// 0 to withdraw the claim.
const SETTLE: &str = r"
for n, key in ipairs(KEYS) do
  redis.call('DEL', key)
  if tonumber(ARGV[2 * n + 1]) > 0 then
    redis.call('HSET', key, 'answer', ARGV[2 * n], 'asked', text(now() - ARGV[1]))
    redis.call('PEXPIRE', key, ARGV[2 * n + 1])
  end
end
return 0
";

/// The state of a question.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Another instance has asked upstream, at this time or a little later.
    Known(Bytes, Instant),
    /// Another instance asks.
    Claimed,
    /// This instance has to ask.
    Open,
}

/// The shared answers. A cheap handle.
#[derive(Clone, Debug)]
pub struct SharedAnswers {
    client: RedisClient,
    hub: Arc<Hub>,
    scripts: Arc<AnswerScripts>,
    prefix: Arc<str>,
    instance: Arc<str>,
}

#[derive(Debug)]
struct AnswerScripts {
    claim: Script,
    look: Script,
    settle: Script,
}

impl SharedAnswers {
    pub(super) fn new(client: RedisClient, hub: Arc<Hub>, prefix: &str, instance: &str) -> Self {
        let script = |code| lua::script(FUNCTIONS, code);
        let scripts =
            AnswerScripts { claim: script(CLAIM), look: script(LOOK), settle: script(SETTLE) };
        Self {
            client,
            hub,
            scripts: Arc::new(scripts),
            prefix: prefix.into(),
            instance: instance.into(),
        }
    }

    /// The answers about these tokens, in their order. Claims those that are open. `None` while Redis
    /// fails: then this instance has to ask. Takes at most half a second.
    pub async fn claim(&self, tokens: &[TokenDigest]) -> Option<Vec<Answer>> {
        let arguments = (&*self.instance, millis(CLAIM_DURATION));
        self.read(&self.scripts.claim, tokens, arguments).await
    }

    /// Like [`claim`](Self::claim), without a claim.
    pub async fn look(&self, tokens: &[TokenDigest]) -> Option<Vec<Answer>> {
        self.read(&self.scripts.look, tokens, &*self.instance).await
    }

    /// Shares answers, each for a time, to questions that were asked at `asked_at`. An answer with no time
    /// withdraws the claim. Takes at most half a second; a failure is of no consequence.
    pub async fn settle(&self, answers: &[(TokenDigest, Bytes, Duration)], asked_at: Instant) {
        if answers.is_empty() || !self.hub.is_redis_available() {
            return;
        }
        let keys: Vec<_> = answers.iter().map(|(token, ..)| self.key(token)).collect();
        let mut arguments = vec![Bytes::from(millis(asked_at.elapsed()).to_string())];
        for (_, answer, duration) in answers {
            arguments.extend([answer.clone(), Bytes::from(millis(*duration).to_string())]);
        }
        let arguments: Vec<&[u8]> = arguments.iter().map(|it| &**it).collect();
        let keys: Vec<_> = keys.iter().map(String::as_str).collect();
        let settle = self.client.run_script::<u64>(&self.scripts.settle, &keys, arguments);
        self.hub.request_within(REQUEST_TIMEOUT, settle).await;
    }

    async fn read(
        &self,
        script: &Script,
        tokens: &[TokenDigest],
        arguments: impl redis::ToRedisArgs,
    ) -> Option<Vec<Answer>> {
        if !self.hub.is_redis_available() {
            return None;
        }
        let sent_at = Instant::now();
        let keys: Vec<_> = tokens.iter().map(|token| self.key(token)).collect();
        let keys: Vec<_> = keys.iter().map(String::as_str).collect();
        let read = self.client.run_script::<Vec<(String, Vec<u8>, u64)>>(script, &keys, arguments);
        let found = self.hub.request_within(REQUEST_TIMEOUT, read).await?;
        let answers = found.into_iter().map(|(state, answer, age)| match &*state {
            "answer" => match sent_at.checked_sub(Duration::from_millis(age)) {
                Some(asked_at) => Answer::Known(answer.into(), asked_at),
                None => Answer::Open,
            },
            "claimed" => Answer::Claimed,
            _ => Answer::Open,
        });
        Some(answers.collect()).filter(|answers: &Vec<_>| answers.len() == tokens.len())
    }

    fn key(&self, token: &TokenDigest) -> String {
        format!("{}:{}", self.prefix, token.to_hex())
    }
}
