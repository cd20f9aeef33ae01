//! The Lua that the scripts of a fleet have in common.

use redis::Script;

/// `now()`: the time of Redis in ms. `text(number)`: an integer without an exponent. `age_since(time)`: the
/// ms since a time as text, or false for a time in the future, which only a clock that was set back shows.
const FUNCTIONS: &str = r"
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function text(number)
  return string.format('%.0f', number)
end
local function age_since(time)
  local age = now() - time
  return age >= 0 and text(age)
end
";

/// A script that consists of the common functions, those of a module, and `code`.
pub(super) fn script(functions: &str, code: &str) -> Script {
    Script::new(&format!("{FUNCTIONS}{functions}{code}"))
}
