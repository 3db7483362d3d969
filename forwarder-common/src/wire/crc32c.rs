//! CRC32c, the checksum of SCTP (RFC 9260 §6.8 and appendix A; polynomial of Castagnoli, 0x11edc6f41).
//!
//! A CRC is the remainder of a division of polynomials over GF(2), and that is linear: what a change of some bytes
//! changes in it is the remainder of that change alone, moved to the left by what stands behind it. Moving by n bytes
//! is a multiplication by x^(8n), of which the binary digits of n take at most sixteen. So the payload need not be
//! read, however long it is.
//!
//! Numbers are *reflected*, as bytes are sent with their lowest bit first: the bit of weight 2^31 is the coefficient of
//! x^0. In this form the checksum stands in the packet with its lowest byte first.

use core::hint::black_box;

/// The polynomial without x^32, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;
/// x^8, reflected.
const ONE_BYTE: u32 = 1 << (31 - 8);
/// Binary digits of a packet's length, which IP gives 16.
const DIGITS: usize = 16;

/// What the register begins with, and what is added to it at the end.
const ALL_ONES: u32 = u32::MAX;

/// x^(8 · 2^k) for each k.
const MOVES: &[u32; DIGITS] = &{
    let mut moves = [ONE_BYTE; DIGITS];
    let mut k = 1;
    while k < DIGITS {
        moves[k] = multiplied(moves[k - 1], moves[k - 1]);
        k += 1;
    }
    moves
};

/// The register after a byte, by the byte that the register and the message have in sum.
const STEPS: &[u32; 256] = &{
    let mut steps = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        steps[byte] = multiplied(byte as u32, ONE_BYTE);
        byte += 1;
    }
    steps
};

/// The product of two remainders.
const fn multiplied(mut left: u32, mut right: u32) -> u32 {
    let mut product = 0;
    let mut digit = 0;
    while digit < u32::BITS {
        // No branches: the kernel's verifier would follow both ways of each.
        product ^= right & 0_u32.wrapping_sub(left >> 31);
        left <<= 1;
        right = right >> 1 ^ POLYNOMIAL & 0_u32.wrapping_sub(right & 1);
        digit += 1;
    }
    product
}

/// The register, of any content before it, after one byte of a message.
///
/// The sum is masked, though both parts of it fit: to the verifier of Linux 6.1 the sum (`^`) of two unknown numbers may be
/// any ("math between map_value pointer and register with unbounded min value is not allowed"). The compiler, which
/// knows better, would drop the mask of a sum that it sees through.
#[inline(always)]
pub const fn step(register: u32, byte: u8) -> u32 {
    let sum = black_box(register ^ byte as u32);
    register >> 8 ^ STEPS[(sum & 0xff) as usize]
}

/// The register before a message.
pub const START: u32 = ALL_ONES;

/// The CRC, by the register after the message.
#[inline(always)]
pub const fn finish(register: u32) -> u32 {
    register ^ ALL_ONES
}

/// The CRC of a message.
#[inline(always)]
pub fn of(message: &[u8]) -> u32 {
    finish(message.iter().fold(START, |register, byte| step(register, *byte)))
}

/// What is to be added (`^`) to the CRC of a message of `len` bytes, fewer than 65 536, when `change` is added to its
/// first four bytes. Of `change`, the lowest byte is the first one.
#[inline(always)]
pub fn of_change(change: u32, len: u32) -> u32 {
    let mut crc = change;
    for (digit, by) in MOVES.iter().enumerate() {
        if len >> digit & 1 != 0 {
            crc = multiplied(crc, *by);
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bit by bit, as appendix A of RFC 9260 defines it, with nothing of the above.
    fn by_definition(message: &[u8]) -> u32 {
        let mut register = u32::MAX;
        for byte in message {
            register ^= u32::from(*byte);
            for _ in 0..8 {
                let is_odd = register & 1 != 0;
                register >>= 1;
                if is_odd {
                    register ^= 0x82f6_3b78;
                }
            }
        }
        !register
    }

    /// RFC 3720 appendix B.4, which uses the same CRC.
    #[test]
    fn the_examples_of_rfc_3720() {
        let ascending: [u8; 32] = core::array::from_fn(|index| index as u8);
        let descending: [u8; 32] = core::array::from_fn(|index| 31 - index as u8);
        assert_eq!(of(&[0; 32]), 0x8a91_36aa);
        assert_eq!(of(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(of(&ascending), 0x46dd_794e);
        assert_eq!(of(&descending), 0x113f_db5c);
        assert_eq!(of(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn a_table_gives_what_the_definition_gives(bytes: [u8; 32], len in 0_usize..=32) {
            prop_assert_eq!(of(&bytes[..len]), by_definition(&bytes[..len]));
        }

        #[test]
        fn an_update_equals_a_recomputation(change: u32, len in 4_usize..65_536, seed: u8) {
            let mut message = [0_u8; 65_536];
            for (index, byte) in message.iter_mut().enumerate() {
                *byte = (index as u8).wrapping_mul(31) ^ seed;
            }
            let message = &mut message[..len];
            let before = of(message);
            for (byte, change) in message.iter_mut().zip(change.to_le_bytes()) {
                *byte ^= change;
            }
            prop_assert_eq!(before ^ of_change(change, len as u32), of(message));
        }
    }
}
