//! What probes send: bytes that a capture recognises and that a receiver can verify at any offset.

use anyhow::{Result, bail};

/// Occurs in every record, hence in every packet that carries at least two records' bytes of a stream, and at the
/// start of every single packet's payload.
pub const MARKER: &[u8] = b"husk-plaintext-marker";

/// Length of a record: the marker, the record's number in ten hexadecimal digits, a newline.
const RECORD: usize = 32;

/// The bytes of the stream from `offset` on.
pub fn fill(offset: u64, buffer: &mut [u8]) {
    let mut at = offset;
    let mut rest = buffer;
    while !rest.is_empty() {
        let record = record(at / RECORD as u64);
        let from = usize::try_from(at % RECORD as u64).unwrap_or(0);
        let length = rest.len().min(RECORD - from);
        let (head, tail) = rest.split_at_mut(length);
        head.copy_from_slice(&record[from..from + length]);
        at += length as u64;
        rest = tail;
    }
}

/// A payload of this length.
#[must_use]
pub fn of_length(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(0, &mut bytes);
    bytes
}

/// Compares received bytes with those of the stream at `offset`.
///
/// # Errors
/// When they differ; the error says where.
pub fn verify(offset: u64, received: &[u8]) -> Result<()> {
    let mut expected = vec![0; received.len()];
    fill(offset, &mut expected);
    match expected.iter().zip(received).position(|(expected, received)| expected != received) {
        None => Ok(()),
        Some(index) => bail!(
            "byte {} of the stream is {:#04x} and should be {:#04x}",
            offset + index as u64,
            received[index],
            expected[index]
        ),
    }
}

fn record(number: u64) -> [u8; RECORD] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut record = [b'\n'; RECORD];
    record[..MARKER.len()].copy_from_slice(MARKER);
    for (index, digit) in record[MARKER.len()..RECORD - 1].iter_mut().rev().enumerate() {
        *digit = DIGITS[usize::try_from((number >> (4 * index)) & 0xf).unwrap_or(0)];
    }
    record
}
