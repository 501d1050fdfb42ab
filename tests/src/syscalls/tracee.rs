//! What a stopped thread is about to do: its system call, the path or file that is about, and the netlink requests it sends.

use std::fs;
use std::io::{IoSlice, IoSliceMut};

use anyhow::{Context, Result, ensure};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use super::table::{Subject, subject};

/// `struct nlmsghdr` (netlink(7)): its length and that of the alignment of messages in bytes, and where in it the type is.
const HEADER_LENGTH: usize = 16;
const ALIGNMENT: usize = 4;
const TYPE_OFFSET: usize = 4;

/// A type beyond all that rtnetlink knows (`RTM_MAX`, include/uapi/linux/rtnetlink.h).
const UNKNOWN_TYPE: [u8; 2] = [0xff, 0x3f];

/// Longest path that is read from a program's memory for people, in bytes.
const PATH_LENGTH: usize = 256;

/// Number and arguments of the call that a stopped thread is in (proc_pid_syscall(5)).
pub(super) fn call_of(thread: Pid) -> Result<(i64, Vec<u64>)> {
    let path = format!("/proc/{thread}/syscall");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut fields = text.split_ascii_whitespace();
    let number = fields.next().and_then(|number| number.parse().ok());
    let number = number.with_context(|| format!("{path} says {text:?}"))?;
    let hexadecimal = |field: &str| u64::from_str_radix(field.trim_start_matches("0x"), 16).ok();
    Ok((number, fields.map_while(hexadecimal).take(6).collect()))
}

/// Gives one of the netlink requests that a thread is about to send (sendto(2)) an unknown type; false if there is none of this
/// index, or what it sends is no netlink.
pub(super) fn spoil_request(thread: Pid, arguments: &[u64], index: usize) -> Result<bool> {
    let [_, base, length, ..] = arguments else { return Ok(false) };
    let (base, length) = (usize::try_from(*base)?, usize::try_from(*length)?);
    let mut datagram = vec![0; length];
    let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut datagram)], &[RemoteIoVec { base, len: length }]);
    ensure!(read.context("reading what the traced program sends")? == length, "what the traced program sends is cut");
    let Some(at) = requests(&datagram).and_then(|found| found.get(index).copied()) else { return Ok(false) };
    let (base, len) = (base + at + TYPE_OFFSET, UNKNOWN_TYPE.len());
    let written = process_vm_writev(thread, &[IoSlice::new(&UNKNOWN_TYPE)], &[RemoteIoVec { base, len }]);
    ensure!(written.context("changing what the traced program sends")? == len, "a request could not be changed");
    Ok(true)
}

/// Offsets of the messages of a netlink datagram; none if it is no netlink, whose lengths add up (netlink(7)).
fn requests(datagram: &[u8]) -> Option<Vec<usize>> {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < datagram.len() {
        let length = datagram.get(at..at + size_of::<u32>())?.try_into().ok().map(u32::from_ne_bytes)?;
        let length = usize::try_from(length).ok().filter(|length| *length >= HEADER_LENGTH)?;
        found.push(at);
        at += length.next_multiple_of(ALIGNMENT);
    }
    (at == datagram.len()).then_some(found)
}

/// What a call is about, as far as its arguments tell; empty otherwise.
pub(super) fn object(thread: Pid, number: i64, arguments: &[u64]) -> String {
    let argument = |index: usize| arguments.get(index).copied().unwrap_or_default();
    match subject(number) {
        Subject::Path(index) => path_at(thread, argument(index)),
        Subject::Descriptor => fs::read_link(format!("/proc/{thread}/fd/{}", argument(0)))
            .map(|target| target.to_string_lossy().into_owned())
            .unwrap_or_default(),
        Subject::Nothing => String::new(),
    }
}

fn path_at(thread: Pid, address: u64) -> String {
    let mut bytes = vec![0; PATH_LENGTH];
    let Ok(base) = usize::try_from(address) else { return String::new() };
    // A path near the end of its page is cut there.
    let remote = [RemoteIoVec { base, len: (PATH_LENGTH).min(4096 - base % 4096) }];
    let read = process_vm_readv(thread, &mut [IoSliceMut::new(&mut bytes)], &remote).unwrap_or_default();
    let end = bytes[..read].iter().position(|byte| *byte == 0).unwrap_or(read);
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
