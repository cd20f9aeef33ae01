//! Buckets of identifiers, and random buckets for contexts without an identifier.
//!
//! Every Unleash SDK hashes `group:identifier` with `MurmurHash3` (x86, 32 bit). For texts beyond ASCII
//! they disagree about the bytes: most hash UTF-8, but the Node SDK, and with it Unleash's own frontend
//! API, hashes the low byte of each UTF-16 unit. The specification is silent on this, so Parapet does
//! the same as Unleash.
//!
//! The group is known when a flag is compiled, so its part of the hash is computed once. This module has
//! no source of randomness: the seed is part of the context.

use xxhash_rust::xxh3::xxh3_64;

/// The hash seed of rollouts.
pub(super) const ROLLOUT_SEED: u32 = 0;

/// The hash seed of variants, which makes their buckets independent of the rollout's.
/// <https://docs.getunleash.io/concepts/stickiness>
pub(super) const VARIANT_SEED: u32 = 86_028_157;

/// The hash state after `group:`, to be continued with an identifier.
#[derive(Debug, Clone, Copy)]
pub(super) struct HashPrefix {
    state: u32,
    /// The 0–3 bytes that did not fill a block, little-endian.
    carry: u32,
    carried: u32,
    len: u32,
}

impl HashPrefix {
    /// Starts the hash of an identifier in `group`.
    pub(super) fn new(group: &str, seed: u32) -> Self {
        let mut prefix = Self { state: seed, carry: 0, carried: 0, len: 0 };
        prefix.update(group);
        prefix.update(":");
        prefix
    }

    /// The bucket of `identifier`, in `1..=buckets`; 0 if there are no buckets.
    pub(super) fn bucket(self, identifier: &str, buckets: u32) -> u32 {
        let mut hash = self;
        hash.update(identifier);
        hash.finish().checked_rem(buckets).map_or(0, |rest| rest + 1)
    }

    fn update(&mut self, text: &str) {
        if text.is_ascii() {
            return self.update_bytes(text.as_bytes());
        }
        for unit in text.encode_utf16() {
            let [low, _] = unit.to_le_bytes();
            self.update_bytes(&[low]);
        }
    }

    fn update_bytes(&mut self, bytes: &[u8]) {
        // Lengths beyond 4 GiB wrap, as they do in the reference implementation's `int`.
        #[expect(clippy::cast_possible_truncation, reason = "murmur3 mixes the length modulo 2^32")]
        let len = bytes.len() as u32;
        self.len = self.len.wrapping_add(len);
        let shift = self.carried * 8;
        let (words, rest) = bytes.as_chunks::<4>();
        for &word in words {
            let wide = u64::from(u32::from_le_bytes(word)) << shift | u64::from(self.carry);
            self.mix_block(wide);
        }
        for &byte in rest {
            self.carry |= u32::from(byte) << (self.carried * 8);
            self.carried += 1;
            if self.carried == 4 {
                self.mix_block(u64::from(self.carry));
                self.carried = 0;
            }
        }
    }

    /// Mixes in the low half. The high half is carried into the next block.
    fn mix_block(&mut self, wide: u64) {
        #[expect(clippy::cast_possible_truncation, reason = "the low half is the block")]
        let block = wide as u32;
        self.carry = u32::try_from(wide >> 32).expect("half of 64 bits fits 32");
        self.state ^= scramble(block);
        self.state = self.state.rotate_left(13).wrapping_mul(5).wrapping_add(0xe654_6b64);
    }

    fn finish(self) -> u32 {
        let mut hash = self.state;
        if self.carried > 0 {
            hash ^= scramble(self.carry);
        }
        hash ^= self.len;
        hash = (hash ^ (hash >> 16)).wrapping_mul(0x85eb_ca6b);
        hash = (hash ^ (hash >> 13)).wrapping_mul(0xc2b2_ae35);
        hash ^ (hash >> 16)
    }
}

fn scramble(block: u32) -> u32 {
    block.wrapping_mul(0xcc9e_2d51).rotate_left(15).wrapping_mul(0x1b87_3593)
}

/// The id of one random draw of a flag, for instance of one strategy.
///
/// It depends on the flag only. With the same seed the result of a draw stays the same until the flag
/// changes, even if other flags change.
#[derive(Debug, Clone, Copy)]
pub(super) struct DrawId(u64);

impl DrawId {
    /// The first draw of the flag with this name.
    pub(super) fn first_of_flag(flag: &str) -> Self {
        Self(xxh3_64(flag.as_bytes()))
    }

    /// Returns this id and advances to the next.
    pub(super) fn take_next(&mut self) -> Self {
        let this = *self;
        self.0 = self.0.wrapping_add(1);
        this
    }
}

/// A random bucket in `1..=buckets`, derived from a context's seed and independent for each `draw_id`; 0
/// if there are no buckets.
///
/// The mixing is the finaliser of `SplitMix64` (Steele, Lea and Flood 2014).
pub(super) fn random_bucket(seed: u64, draw_id: DrawId, buckets: u32) -> u32 {
    let mut mixed = seed.wrapping_add(draw_id.0.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^= mixed >> 31;
    let high = u32::try_from(mixed >> 32).expect("half of 64 bits fits 32");
    high.checked_rem(buckets).map_or(0, |rest| rest + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference implementation's verification values: `hash(seed, "")` and of short strings.
    #[test]
    fn murmur3_matches_its_reference_values() {
        let hash = |seed, text: &str| {
            let mut hash = HashPrefix { state: seed, carry: 0, carried: 0, len: 0 };
            hash.update(text);
            hash.finish()
        };
        assert_eq!(hash(0, ""), 0);
        assert_eq!(hash(1, ""), 0x514e_28b7);
        assert_eq!(hash(0, "test"), 0xba6b_d213);
        assert_eq!(hash(0x9747_b28c, "Hello, world!"), 0x2488_4cba);
        assert_eq!(hash(0, "The quick brown fox jumps over the lazy dog"), 0x2e4f_f723);
    }

    /// <https://docs.getunleash.io/concepts/stickiness>: known values of the official SDKs.
    #[test]
    fn buckets_equal_those_of_the_official_sdks() {
        let check = |seed, group, id, buckets, expect| {
            assert_eq!(HashPrefix::new(group, seed).bucket(id, buckets), expect, "{group}:{id}");
        };
        check(ROLLOUT_SEED, "gr1", "123", 100, 73);
        check(ROLLOUT_SEED, "groupX", "999", 100, 25);
        check(VARIANT_SEED, "gr1", "123", 100, 96);
        check(VARIANT_SEED, "groupX", "999", 100, 60);
        check(VARIANT_SEED, "groupX", "999", 0, 0);
    }

    /// Values of `murmurhash3js` 3.0.1, with which Unleash evaluates.
    #[test]
    fn buckets_beyond_ascii_equal_those_of_the_node_sdk() {
        let check = |seed, group, id, buckets, expect| {
            assert_eq!(HashPrefix::new(group, seed).bucket(id, buckets), expect, "{group}:{id}");
        };
        check(ROLLOUT_SEED, "gr1", "äöü", 100, 3);
        check(ROLLOUT_SEED, "gr1", "日本語", 100, 49);
        check(VARIANT_SEED, "gr1", "😀x", 1000, 504);
        check(ROLLOUT_SEED, "größe", "7", 100, 89);
    }

    proptest! {
        #[test]
        fn hash_of_prefix_and_identifier_equals_hash_of_the_whole(group in ".{0,12}", id in ".{0,12}") {
            let whole = HashPrefix::new(&format!("{group}:{id}"), 7);
            let mut split = HashPrefix::new(&group, 7);
            split.update(&id);
            split.update(":");
            prop_assert_eq!(whole.finish(), split.finish());
        }

        #[test]
        fn draws_stay_within_their_buckets(seed: u64, id: u64, buckets in 1..1000_u32) {
            prop_assert!((1..=buckets).contains(&random_bucket(seed, DrawId(id), buckets)));
        }
    }

    #[test]
    fn draws_with_different_ids_are_spread_evenly() {
        let mut id = DrawId::first_of_flag("flag");
        let of_one: Vec<DrawId> = (0..10_000).map(|_| id.take_next()).collect();
        let of_many = (0..10_000).map(|n| DrawId::first_of_flag(&format!("flag-{n}"))).collect();
        for ids in [of_one, of_many] {
            let mut counts = [0_u32; 10];
            for id in ids {
                counts[random_bucket(42, id, 10) as usize - 1] += 1;
            }
            assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
        }
    }
}
