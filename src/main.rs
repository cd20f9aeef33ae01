//! The `parapet` binary.

fn main() {}
