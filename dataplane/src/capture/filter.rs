//! Which packets a capture is for, decided in the kernel: a filter as a value, and as a program of classic BPF.
//!
//! The program sees a packet from its network header on, wherever that lies (`SKF_NET_OFF`, include/uapi/linux/filter.h), so that
//! one program does for Ethernet and for tunnel devices, which have no link header. It looks at the outermost IP header.
//! Extension headers of IPv6 are not followed, and of a fragment only the first has ports.

use std::net::IpAddr;

use husk_overlay::prefix::{Family, Prefix};
use nix::libc::sock_filter;
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// Bytes of a packet that are kept: all of any packet, those that were not segmented yet included.
pub const WHOLE: u32 = 1 << 18;

/// `BPF_MAXINSNS` (include/uapi/linux/bpf_common.h).
const MOST: usize = 4096;

/// Something that is true of a packet or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Test {
    /// It is from or to an address within this prefix.
    Address(Prefix),
    /// It carries this protocol (IANA number).
    Protocol(u8),
    /// It is TCP, UDP or SCTP from or to this port.
    Port(u16),
}

/// Packets that fulfil every clause, which is to say one test of it at least. Without clauses, all packets; an empty clause is
/// fulfilled by none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Filter {
    /// The clauses.
    pub clauses: Vec<Vec<Test>>,
}

impl Filter {
    /// The packets that both filters let pass.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        self.clauses.extend(other.clauses.iter().cloned());
        self
    }

    /// The program, which keeps up to `length` bytes of what passes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is longer than the kernel takes.
    pub fn program(&self, length: u32) -> Result<Vec<sock_filter>, Error> {
        let mut program = Vec::new();
        for clause in &self.clauses {
            let mut hits = Vec::new();
            for test in clause {
                one(*test, &mut program, &mut hits);
            }
            program.push(statement(RETURN, 0));
            // Where one of the tests hits, the next clause goes on.
            let next = program.len();
            for hit in hits {
                program[hit].k = count(next - hit - 1);
            }
        }
        program.push(statement(RETURN, length));
        if program.len() > MOST {
            return Err(Error::Unsupported {
                operation: "capture with",
                object: "this filter".to_owned(),
                reason: format!(
                    "it takes {} instructions of classic BPF, of which the kernel takes {MOST}",
                    program.len()
                ),
                remedy: "name fewer addresses",
            });
        }
        Ok(program)
    }
}

// include/uapi/linux/bpf_common.h: class, size, mode, operation, source.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF_AT_X: u16 = 0x48;
const LOAD_X_HEADER_LENGTH: u16 = 0xb1;
const AND: u16 = 0x54;
const GO: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_BITS: u16 = 0x45;
const RETURN: u16 = 0x06;

/// `SKF_AD_OFF + SKF_AD_PROTOCOL`: the EtherType, also of what has no Ethernet header.
const ETHERTYPE: u32 = (-0x1000_i32).cast_unsigned();
/// `SKF_NET_OFF`: the network header.
const NETWORK: u32 = (-0x0010_0000_i32).cast_unsigned();

const ETHERTYPE_IPV4: u32 = 0x0800;
const ETHERTYPE_IPV6: u32 = 0x86dd;

const TCP: u32 = 6;
const UDP: u32 = 17;
const SCTP: u32 = 132;

fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn condition(code: u16, k: u32, yes: u8, no: u8) -> sock_filter {
    sock_filter { code, jt: yes, jf: no, k }
}

/// An offset within the network header.
fn network(offset: u32) -> u32 {
    NETWORK + offset
}

fn count(instructions: usize) -> u32 {
    u32::try_from(instructions).unwrap_or(u32::MAX)
}

/// A test. Where it hits, the program goes on at a jump whose aim is still open; where it does not, behind the test.
fn one(test: Test, program: &mut Vec<sock_filter>, hits: &mut Vec<usize>) {
    match test {
        Test::Address(prefix) => address(prefix, program, hits),
        Test::Protocol(number) => {
            // IPv4 has it at byte 9, IPv6 its first next header at byte 6.
            for (ethertype, offset) in [(ETHERTYPE_IPV4, 9), (ETHERTYPE_IPV6, 6)] {
                let body = vec![statement(LOAD_BYTE, network(offset)), equal(number.into())];
                block(ethertype, body, program, hits);
            }
        }
        Test::Port(port) => {
            let port = u32::from(port);
            block(ETHERTYPE_IPV4, ports_ipv4(port), program, hits);
            block(ETHERTYPE_IPV6, ports_ipv6(port), program, hits);
        }
    }
}

/// A comparison whose hit is the end of a body; its miss is filled in by [`block`].
fn equal(value: u32) -> sock_filter {
    condition(IF_EQUAL, value, HIT, MISS)
}

/// Placeholders in a body: to its hit, and to its end. Bodies are far shorter.
const HIT: u8 = 254;
const MISS: u8 = 255;

/// `body` for packets of one family, then an open jump for hits.
fn block(ethertype: u32, body: Vec<sock_filter>, program: &mut Vec<sock_filter>, hits: &mut Vec<usize>) {
    let mut whole = vec![statement(LOAD_WORD, ETHERTYPE), condition(IF_EQUAL, ethertype, 0, MISS)];
    whole.extend(body);
    // The last instruction is the jump of hits; a miss goes past it.
    let end = whole.len();
    for (at, instruction) in whole.iter_mut().enumerate() {
        for target in [&mut instruction.jt, &mut instruction.jf] {
            let distance = |aim: usize| u8::try_from(aim - at - 1).unwrap_or(u8::MAX);
            *target = match *target {
                HIT => distance(end),
                MISS => distance(end + 1),
                near => near,
            };
        }
    }
    whole.push(statement(GO, 0));
    program.extend(whole);
    hits.push(program.len() - 1);
}

fn address(prefix: Prefix, program: &mut Vec<sock_filter>, hits: &mut Vec<usize>) {
    let (ethertype, sides, octets) = match prefix.address() {
        IpAddr::V4(address) => (ETHERTYPE_IPV4, [12, 16], address.octets().to_vec()),
        IpAddr::V6(address) => (ETHERTYPE_IPV6, [8, 24], address.octets().to_vec()),
    };
    let words: Vec<u32> =
        octets.chunks_exact(4).map(|it| u32::from_be_bytes(it.try_into().expect("chunks of four bytes"))).collect();
    for side in sides {
        let mut body = Vec::new();
        let mut left = u32::from(prefix.length());
        for (word, offset) in words.iter().zip((side..).step_by(4)) {
            let bits = left.min(32);
            left -= bits;
            if bits == 0 {
                break;
            }
            let mask = u32::MAX << (32 - bits);
            body.push(statement(LOAD_WORD, network(offset)));
            if mask != u32::MAX {
                body.push(statement(AND, mask));
            }
            // All words have to be equal: each but the last goes on with the next one.
            body.push(condition(IF_EQUAL, word & mask, 0, MISS));
        }
        // The empty prefix is all of the family.
        block(ethertype, body, program, hits);
    }
}

fn with_ports(protocol_at: u32, rest: Vec<sock_filter>) -> Vec<sock_filter> {
    let mut body = vec![
        statement(LOAD_BYTE, network(protocol_at)),
        condition(IF_EQUAL, TCP, 2, 0),
        condition(IF_EQUAL, UDP, 1, 0),
        condition(IF_EQUAL, SCTP, 0, MISS),
    ];
    body.extend(rest);
    body
}

fn ports_ipv4(port: u32) -> Vec<sock_filter> {
    with_ports(
        9,
        vec![
            // A fragment with an offset has none.
            statement(LOAD_HALF, network(6)),
            condition(IF_BITS, 0x1fff, MISS, 0),
            statement(LOAD_X_HEADER_LENGTH, network(0)),
            statement(LOAD_HALF_AT_X, network(0)),
            condition(IF_EQUAL, port, HIT, 0),
            statement(LOAD_HALF_AT_X, network(2)),
            equal(port),
        ],
    )
}

fn ports_ipv6(port: u32) -> Vec<sock_filter> {
    with_ports(
        6,
        vec![
            statement(LOAD_HALF, network(40)),
            condition(IF_EQUAL, port, HIT, 0),
            statement(LOAD_HALF, network(42)),
            equal(port),
        ],
    )
}

impl Test {
    /// The family that it is about; none for both.
    #[must_use]
    pub fn family(&self) -> Option<Family> {
        match self {
            Self::Address(prefix) => Some(prefix.family()),
            Self::Protocol(_) | Self::Port(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefix(text: &str) -> Test {
        Test::Address(text.parse().unwrap())
    }

    /// Every jump stays within the program: the kernel refuses others (`bpf_check_classic`, net/core/filter.c).
    fn check(program: &[sock_filter]) {
        for (at, it) in program.iter().enumerate() {
            let aims = match it.code {
                IF_EQUAL | IF_BITS => vec![at + 1 + usize::from(it.jt), at + 1 + usize::from(it.jf)],
                GO => vec![at + 1 + it.k as usize],
                _ => Vec::new(),
            };
            assert!(aims.iter().all(|aim| *aim < program.len()), "{at}: {aims:?} of {}", program.len());
        }
        assert_eq!(program.last().unwrap().code, RETURN);
    }

    #[test]
    fn jumps_stay_inside() {
        let clauses = vec![
            vec![prefix("10.1.2.0/24"), prefix("fd00::/20"), prefix("::/0"), prefix("fd00::1/128")],
            vec![Test::Protocol(17), Test::Port(80)],
            Vec::new(),
        ];
        check(&Filter { clauses }.program(WHOLE).unwrap());
        assert_eq!(Filter::default().program(96).unwrap().len(), 1);
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let many = (0..=255).map(|byte| prefix(&format!("fd00::{byte:x}/128"))).collect();
        let error = Filter { clauses: vec![many] }.program(WHOLE).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }
}
