//! The Lua scripts of the usage log, each of them atomic.
//!
//! `KEYS` are those of [`UsageKeys`](super::super::topic::UsageKeys), in the order of their declaration.
//!
//! A Redis without free memory rejects a script at its first command that needs memory, unless the
//! script has written before. So scripts that add something begin with it, and are rejected as a whole;
//! scripts that must succeed then begin by removing something.

use redis::Script;

use super::super::lua;

/// Functions that the scripts share.
const FUNCTIONS: &str = r"
local fence, bodies, environments, waiting, claimed, claims, deadlines, outcomes, finished, bytes,
  epoch = unpack(KEYS)
local function state(id)
  local outcome = redis.call('HGET', outcomes, id)
  if outcome then return outcome end
  if redis.call('HEXISTS', bodies, id) == 0 then return '' end
  if redis.call('ZSCORE', waiting, id) then return 'waiting' end
  local claim = redis.call('HGET', claimed, id)
  if claim and redis.call('HEXISTS', claims, claim) == 1 then return 'waiting' end
  return ''
end
local function remove(id)
  local size = redis.call('HSTRLEN', bodies, id)
  redis.call('HDEL', bodies, id)
  redis.call('HDEL', environments, id)
  return size
end
local function used()
  if redis.call('HLEN', bodies) == 0 then return 0 end
  return math.max(0, tonumber(redis.call('GET', bytes) or '0'))
end
local function add(size)
  redis.call('SET', bytes, text(math.max(0, used() + size)))
end
local function keep(retention)
  for n = 2, #KEYS do redis.call('PEXPIRE', KEYS[n], retention) end
end
";

/// `ARGV`: batch, batches whose outcomes are known. Returns the state of the batch: its outcome,
/// `waiting`, or nothing.
const LOOK: &str = r"
for n = 2, #ARGV do
  redis.call('HDEL', outcomes, ARGV[n])
  redis.call('ZREM', finished, ARGV[n])
end
return state(ARGV[1])
";

/// `ARGV`: batch, environment, body, delay in ms, maximum bytes, maximum batches, retention in ms.
/// Returns the state of the batch, or `full`.
const APPEND: &str = r"
local id, body = ARGV[1], ARGV[3]
local known = state(id)
if known ~= '' then return known end
local size = #body - redis.call('HSTRLEN', bodies, id)
if used() + size > tonumber(ARGV[5]) or redis.call('ZCARD', waiting) >= tonumber(ARGV[6]) then
  return 'full'
end
local before = used()
redis.call('HSET', bodies, id, body)
redis.call('HSET', environments, id, ARGV[2])
redis.call('ZADD', waiting, text(now() + ARGV[4]), id)
redis.call('SET', bytes, text(before + size))
keep(ARGV[7])
return 'waiting'
";

/// `ARGV`: a new epoch, retention in ms. Returns the number of batches that wait, the bytes of all bodies,
/// the number of claims, and the epoch.
const SIZE: &str = r"
local current = redis.call('GET', epoch)
if not current and type(redis.pcall('SET', epoch, ARGV[1], 'PX', ARGV[2])) == 'table' then
  current = ARGV[1]
end
return {redis.call('ZCARD', waiting), used(), redis.call('HLEN', claims), current or ''}
";

/// `ARGV`: fence, maximum bytes, maximum batches. Returns the claims and the oldest batches that wait, or
/// nothing if another instance leads. Batches of an environment with a claim are left out, so that one whose
/// usage upstream does not accept does not delay others.
const TAKE: &str = r"
if redis.call('GET', fence) ~= ARGV[1] then return false end
local time = now()
local open, busy = {}, {}
local all = redis.call('HGETALL', claims)
for n = 1, #all, 2 do
  local id, deadline = all[n], redis.call('HGET', deadlines, all[n]) or '0:0'
  local holder, ends = string.match(deadline, '^(%d+):(%d+)$')
  local rest = 0
  if holder ~= ARGV[1] then rest = math.max(0, tonumber(ends) - time) end
  local body = redis.call('HGET', bodies, id)
  if body then
    local environment = redis.call('HGET', environments, id) or ''
    busy[environment] = true
    open[#open + 1] = {id, environment, body, all[n + 1], text(rest)}
  end
end
local batches, size, max_batches = {}, 0, tonumber(ARGV[3])
local ids = max_batches > 0 and redis.call('ZRANGEBYSCORE', waiting, '-inf', time) or {}
for _, id in ipairs(ids) do
  local environment = redis.call('HGET', environments, id) or ''
  local body = not busy[environment] and redis.call('HGET', bodies, id)
  if body then
    batches[#batches + 1] = {id, environment, body}
    size = size + #body
    if size >= tonumber(ARGV[2]) or #batches >= max_batches then break end
  elseif not busy[environment] then
    redis.call('ZREM', waiting, id)
  end
end
return {open, batches}
";

/// `ARGV`: fence, merged batch, environment, body, duration in ms, parts. Returns whether the merged batch
/// may be sent.
///
/// A claim that exists already is prolonged, by its holder at any time and by others after its end.
const CLAIM: &str = r"
if redis.call('GET', fence) ~= ARGV[1] then return 0 end
local id = ARGV[2]
if redis.call('HEXISTS', claims, id) == 1 then
  local deadline = redis.call('HGET', deadlines, id) or '0:0'
  local holder, ends = string.match(deadline, '^(%d+):(%d+)$')
  if holder ~= ARGV[1] and tonumber(ends) > now() then return 0 end
else
  local parts = {}
  for n = 6, #ARGV do
    if not redis.call('ZSCORE', waiting, ARGV[n]) then return 0 end
    parts[#parts + 1] = ARGV[n]
  end
  for _, part in ipairs(parts) do
    redis.call('ZREM', waiting, part)
    redis.call('HSET', claimed, part, id)
  end
  redis.call('HSET', claims, id, table.concat(parts, ' '))
  if redis.call('HEXISTS', bodies, id) == 0 then
    add(#ARGV[4])
    redis.call('HSET', bodies, id, ARGV[4])
    redis.call('HSET', environments, id, ARGV[3])
  end
end
redis.call('HSET', deadlines, id, ARGV[1] .. ':' .. text(now() + ARGV[5]))
return 1
";

/// `ARGV`: merged batch, outcome, maximum outcomes, retention in ms, parts.
///
/// It needs neither a claim nor the lease: the outcome is a fact, also if Redis has lost its data
/// meanwhile.
const FINISH: &str = r"
local id, size, time = ARGV[1], 0, now()
redis.call('HDEL', claims, id)
redis.call('HDEL', deadlines, id)
size = size + remove(id)
for n = 5, #ARGV do
  local part = ARGV[n]
  redis.call('ZREM', waiting, part)
  redis.call('HDEL', claimed, part)
  size = size + remove(part)
  redis.call('HSET', outcomes, part, ARGV[2])
  redis.call('ZADD', finished, text(time), part)
end
add(-size)
local excess = redis.call('ZCARD', finished) - ARGV[3]
if excess > 0 then
  for _, old in ipairs(redis.call('ZRANGE', finished, 0, excess - 1)) do
    redis.call('HDEL', outcomes, old)
  end
  redis.call('ZREMRANGEBYRANK', finished, 0, excess - 1)
end
keep(ARGV[4])
return 0
";

/// `ARGV`: fence, merged batch, parts. The parts wait again, if this leader has the claim.
const RELEASE: &str = r"
local id = ARGV[2]
local deadline = redis.call('HGET', deadlines, id) or ''
if string.match(deadline, '^(%d+):') ~= ARGV[1] then return 0 end
redis.call('HDEL', claims, id)
redis.call('HDEL', deadlines, id)
local is_part, time = false, now()
for n = 3, #ARGV do
  is_part = is_part or ARGV[n] == id
  redis.call('HDEL', claimed, ARGV[n])
  if redis.call('HEXISTS', bodies, ARGV[n]) == 1 then
    redis.call('ZADD', waiting, text(time), ARGV[n])
  end
end
if not is_part then add(-remove(id)) end
return 0
";

/// The scripts, with their hashes.
#[derive(Debug)]
pub(super) struct Scripts {
    pub(super) look: Script,
    pub(super) append: Script,
    pub(super) size: Script,
    pub(super) take: Script,
    pub(super) claim: Script,
    pub(super) finish: Script,
    pub(super) release: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let script = |code| lua::script(FUNCTIONS, code);
        Self {
            look: script(LOOK),
            append: script(APPEND),
            size: script(SIZE),
            take: script(TAKE),
            claim: script(CLAIM),
            finish: script(FINISH),
            release: script(RELEASE),
        }
    }
}
