//! Who may do what: the tokens of an instance that stands on its own.
//!
//! Nothing here listens or serves; `auth` asks for the grants once, at the start.

pub mod tokens;
