//! A binary to upgrade to: the one under test, with other BPF programs in it.
//!
//! A release differs from the one before in its programs, and whether they are really replaced shows in the kernel's tag
//! of them, which is a hash of their instructions. So two instructions that stand beside each other and know nothing of
//! each other change places in every function of the object that the binary has embedded: other programs, which the
//! verifier looks at anew, and which do the same.
//!
//! Layout of the tables, configuration and command line are those of the binary under test.

use std::{collections::HashSet, fs, ops::Range, os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context, Result, ensure};
use object::{
    Architecture, Endianness, Object as _, ObjectSection as _, ObjectSymbol as _, SectionKind, SymbolKind,
};

/// What every ELF file begins with (`elf(5)`).
const ELF_MAGIC: &[u8] = b"\x7fELF";
/// Bytes of an instruction (RFC 9669, section 3).
const INSTRUCTION: usize = 8;
/// `dst = imm` and `dst = src`, 64 bits wide (RFC 9669, section 4.1).
const MOVE_IMMEDIATE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
/// Classes of jumps, and the operations of them that lead elsewhere or nowhere (section 4.3).
const CLASS_JUMP: u8 = 0x05;
const CLASS_JUMP_32: u8 = 0x06;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
const JUMP_LONG: u8 = CLASS_JUMP_32;

/// Copies the agent's binary to `to`, with other programs in it.
pub fn with_other_programs(binary: &Path, to: &Path) -> Result<()> {
    let mut bytes = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let start = embedded_object(&bytes).with_context(|| format!("no BPF object in {}", binary.display()))?;
    let swaps = swaps(&bytes[start..])?;
    ensure!(!swaps.is_empty(), "no two instructions can change places");
    for at in swaps {
        let at = start + at;
        let (one, other) = bytes[at..at + 2 * INSTRUCTION].split_at_mut(INSTRUCTION);
        one.swap_with_slice(other);
    }
    fs::write(to, bytes)?;
    Ok(fs::set_permissions(to, fs::Permissions::from_mode(0o755))?)
}

/// Where the BPF object begins that a binary has embedded.
fn embedded_object(bytes: &[u8]) -> Option<usize> {
    let mut starts = bytes
        .windows(ELF_MAGIC.len())
        .enumerate()
        .filter(|(_, window)| *window == ELF_MAGIC)
        .map(|(start, _)| start);
    starts.find(|start| {
        object::File::parse(&bytes[*start..]).is_ok_and(|file| file.architecture() == Architecture::Bpf)
    })
}

/// Offsets in the object of the first of two instructions that may change places: one pair a function.
fn swaps(bytes: &[u8]) -> Result<Vec<usize>> {
    let file = object::File::parse(bytes)?;
    ensure!(
        file.endianness() == Endianness::Little,
        "the registers of big-endian instructions stand the other way round"
    );
    let mut swaps = Vec::new();
    for section in file
        .sections()
        .filter(|section| section.kind() == SectionKind::Text)
    {
        let code = section.data()?;
        let (offset, _) = section.file_range().context("code is in the file")?;
        let targets = targets(code);
        for symbol in file.symbols() {
            if symbol.section_index() != Some(section.index()) || symbol.kind() != SymbolKind::Text {
                continue;
            }
            let first = usize::try_from(symbol.address())? / INSTRUCTION;
            let count = usize::try_from(symbol.size())? / INSTRUCTION;
            let found = pair(code, first..first + count, &targets);
            swaps.extend(found.map(|at| offset as usize + at * INSTRUCTION));
        }
    }
    Ok(swaps)
}

/// An instruction; what the ones are called that no swap needs is of no matter.
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
}

fn instruction(code: &[u8], index: usize) -> Option<Instruction> {
    let bytes: &[u8; INSTRUCTION] = code.get(index * INSTRUCTION..)?.first_chunk()?;
    Some(Instruction {
        code: bytes[0],
        destination: bytes[1] & 0xf,
        source: bytes[1] >> 4,
        offset: i16::from_le_bytes([bytes[2], bytes[3]]),
        immediate: i32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    })
}

/// Instructions that are jumped to, by index.
fn targets(code: &[u8]) -> HashSet<i64> {
    let mut targets = HashSet::new();
    for index in 0..code.len() / INSTRUCTION {
        let Some(one) = instruction(code, index) else {
            break;
        };
        let is_jump = [CLASS_JUMP, CLASS_JUMP_32].contains(&(one.code & 0x07));
        if !is_jump || [CALL, EXIT].contains(&(one.code & 0xf0)) {
            continue;
        }
        let distance = if one.code == JUMP_LONG {
            i64::from(one.immediate)
        } else {
            i64::from(one.offset)
        };
        targets.insert(index as i64 + 1 + distance);
    }
    targets
}

/// The first two moves of a function that stand beside each other, and of which neither reads or writes what the other
/// writes.
fn pair(code: &[u8], function: Range<usize>, targets: &HashSet<i64>) -> Option<usize> {
    let as_move = |index| {
        // An offset makes it a move with sign extension, or of an address space.
        instruction(code, index)
            .filter(|one| [MOVE_IMMEDIATE, MOVE_REGISTER].contains(&one.code) && one.offset == 0)
    };
    let reads = |one: Instruction, register: u8| one.code == MOVE_REGISTER && one.source == register;
    (function.start..function.end.saturating_sub(1)).find(|index| {
        let (Some(one), Some(other)) = (as_move(*index), as_move(index + 1)) else {
            return false;
        };
        one.destination != other.destination
            && !reads(one, other.destination)
            && !reads(other, one.destination)
            && !targets.contains(&(*index as i64 + 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const R1_IS_7: [u8; 8] = [MOVE_IMMEDIATE, 0x01, 0, 0, 7, 0, 0, 0];
    const R2_IS_R1: [u8; 8] = [MOVE_REGISTER, 0x12, 0, 0, 0, 0, 0, 0];
    const R3_IS_R6: [u8; 8] = [MOVE_REGISTER, 0x63, 0, 0, 0, 0, 0, 0];
    /// `goto +1`.
    const SKIP: [u8; 8] = [CLASS_JUMP, 0, 1, 0, 0, 0, 0, 0];

    fn found(code: &[[u8; 8]]) -> Option<usize> {
        let code = code.concat();
        pair(&code, 0..code.len() / INSTRUCTION, &targets(&code))
    }

    #[test]
    fn only_instructions_that_know_nothing_of_each_other_change_places() {
        assert_eq!(found(&[R1_IS_7, R3_IS_R6]), Some(0));
        assert_eq!(found(&[R1_IS_7, R2_IS_R1, R3_IS_R6]), Some(1));
        // The second reads what the first writes.
        assert_eq!(found(&[R1_IS_7, R2_IS_R1]), None);
        assert_eq!(found(&[R1_IS_7, R1_IS_7]), None);
        // Somebody comes to the second without the first.
        assert_eq!(found(&[SKIP, R1_IS_7, R3_IS_R6]), None);
        assert_eq!(found(&[SKIP, R2_IS_R1, R1_IS_7, R3_IS_R6]), Some(2));
    }
}
