//! Random changes of stored inputs, for a bounded run with no fuzzer at hand.

/// xorshift64*: the same numbers from the same seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn any(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, 0 where that is 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.any() >> 16).unwrap_or(0) % limit.max(1)
    }
}

/// An input made of one stored input, or two, or of nothing: bytes changed, repeated, cut and put in.
#[must_use]
pub fn mutated(corpus: &[Vec<u8>], random: &mut Random, longest: usize) -> Vec<u8> {
    let mut input = corpus.get(random.below(corpus.len() + 1)).cloned().unwrap_or_default();
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 => input.extend((0..random.below(64)).map(|_| random.any().to_le_bytes()[0])),
            1 => {
                let byte = random.any().to_le_bytes()[0];
                if let Some(slot) = input.get_mut(at) {
                    *slot = byte;
                }
            }
            2 => {
                let bit = 1 << random.below(8);
                if let Some(slot) = input.get_mut(at) {
                    *slot ^= bit;
                }
            }
            3 => input.truncate(at),
            4 => {
                let edge = [0, 0xff, 0x7f, 0x80][random.below(4)];
                let end = (at + [1, 2, 4, 8][random.below(4)]).min(input.len());
                input.get_mut(at..end).unwrap_or_default().fill(edge);
            }
            5 => {
                let end = (at + random.below(64)).min(input.len());
                let piece = input.get(at..end).unwrap_or_default().to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                if let Some(other) = corpus.get(random.below(corpus.len())) {
                    let from = random.below(other.len() + 1);
                    input.truncate(at);
                    input.extend(other.get(from..).unwrap_or_default());
                }
            }
        }
    }
    input.truncate(longest);
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_repeat_and_stay_in_bounds() {
        let corpus = vec![vec![1; 100], vec![2; 10]];
        let run = || {
            let mut random = Random::new(7);
            (0..500).map(|_| mutated(&corpus, &mut random, 64)).collect::<Vec<_>>()
        };
        let inputs = run();
        assert_eq!(inputs, run());
        assert!(inputs.iter().all(|input| input.len() <= 64));
        assert!(inputs.iter().any(Vec::is_empty) && inputs.iter().any(|input| input.len() > 20));
    }
}
