//! What the runtime says on standard input.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::deadline::Deadline;
use crate::error::{Code, Failure};

/// Longest network configuration that is read, in bytes; results of chained plugins are some kilobytes.
const LONGEST: usize = 16 << 20;

/// How long the runtime may take to write the configuration to its end.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Reads to the end of the input, which a runtime marks by closing it. Every wait ends with the deadline.
pub(crate) fn read(mut input: impl Read + AsFd, deadline: Deadline) -> Result<Vec<u8>, Failure> {
    let failed =
        |reason: String| Failure::new(Code::Io, format!("read the network configuration on standard input: {reason}"));
    let mut text = Vec::new();
    let mut piece = vec![0; 16 << 10];
    loop {
        if !is_readable(&input, deadline).map_err(|error| failed(error.to_string()))? {
            let (seconds, bytes) = (deadline.seconds(), text.len());
            return Err(failed(format!("the runtime did not close it within {seconds} s, after {bytes} bytes")));
        }
        match input.read(&mut piece) {
            Ok(0) => return Ok(text),
            Ok(length) => text.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error.to_string())),
        }
        if text.len() > LONGEST {
            return Err(failed(format!("it is longer than {LONGEST} bytes")));
        }
    }
}

/// Waits until there is something to read, or the end; false when the deadline comes first.
fn is_readable(input: &impl AsFd, deadline: Deadline) -> io::Result<bool> {
    loop {
        let mut descriptors = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        let left = PollTimeout::try_from(deadline.allow(PATIENCE)).unwrap_or(PollTimeout::MAX);
        match poll(&mut descriptors, left) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write as _;

    fn pipe() -> (File, File) {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        (File::from(reader), File::from(writer))
    }

    #[test]
    fn an_input_is_read_to_its_end() {
        let (reader, mut writer) = pipe();
        let sender = std::thread::spawn(move || writer.write_all(&[b'x'; 100_000]));
        assert_eq!(read(reader, Deadline::after(PATIENCE)).unwrap().len(), 100_000);
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn a_runtime_that_does_not_close_its_end_is_not_waited_for_without_end() {
        let (reader, mut writer) = pipe();
        writer.write_all(b"{").unwrap();
        let failure = read(reader, Deadline::after(Duration::from_millis(20))).unwrap_err();
        assert_eq!(failure.code, Code::Io);
        assert!(failure.message.contains("did not close it") && failure.message.contains("1 bytes"), "{failure}");
        drop(writer);
    }
}
