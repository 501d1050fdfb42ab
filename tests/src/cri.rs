//! As much of a client of the Container Runtime Interface as the kubelet needs for a pod: gRPC (one call per connection, no
//! compression) over HTTP/2 (RFC 9113) over the runtime's socket, and Protocol Buffers written and read by field number
//! (k8s.io/cri-api/pkg/apis/runtime/v1/api.proto).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::patience;

/// How long the runtime may take for one call.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Types and flags of HTTP/2 frames (RFC 9113, section 6).
mod frame {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RESET: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GO_AWAY: u8 = 7;
    pub(super) const END_STREAM: u8 = 1;
    pub(super) const ACKNOWLEDGED: u8 = 1;
    pub(super) const END_HEADERS: u8 = 4;
}

/// A message under construction.
#[derive(Debug, Clone, Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// An empty message.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With a number in a field.
    #[must_use]
    pub fn number(mut self, field: u32, value: u64) -> Self {
        self.varint(u64::from(field) << 3);
        self.varint(value);
        self
    }

    /// With a text in a field.
    #[must_use]
    pub fn text(self, field: u32, value: &str) -> Self {
        self.bytes(field, value.as_bytes())
    }

    /// With a message in a field.
    #[must_use]
    pub fn message(self, field: u32, value: &Self) -> Self {
        self.bytes(field, &value.0)
    }

    fn bytes(mut self, field: u32, value: &[u8]) -> Self {
        self.varint(u64::from(field) << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value.to_le_bytes()[0] | 0x80);
            value >>= 7;
        }
        self.0.push(value.to_le_bytes()[0]);
    }

    /// What a field that is a text or a message holds, each time it occurs.
    ///
    /// # Errors
    /// When this is no message.
    pub fn all(&self, field: u32) -> Result<Vec<Self>> {
        let mut rest = self.0.as_slice();
        let mut found = Vec::new();
        while !rest.is_empty() {
            let key = read_varint(&mut rest)?;
            match key & 7 {
                0 => drop(read_varint(&mut rest)?),
                2 => {
                    let length = usize::try_from(read_varint(&mut rest)?)?;
                    let (value, after) = rest.split_at_checked(length).context("a field ends too early")?;
                    rest = after;
                    if key >> 3 == u64::from(field) {
                        found.push(Self(value.to_vec()));
                    }
                }
                1 => rest = rest.get(8..).context("a field ends too early")?,
                5 => rest = rest.get(4..).context("a field ends too early")?,
                other => bail!("a field has the wire type {other}"),
            }
        }
        Ok(found)
    }

    /// What a field holds that is there once.
    ///
    /// # Errors
    /// When it is missing.
    pub fn one(&self, field: u32) -> Result<Self> {
        self.all(field)?.pop().with_context(|| format!("field {field} is missing"))
    }

    /// The content as text.
    #[must_use]
    pub fn as_text(&self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

fn read_varint(rest: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first().context("a number ends too early")?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    bail!("a number has more than 64 bits")
}

/// A configuration of containerd, in the form that 1.6 and 2.x read alike (2.x migrates version 2): `root` is where it keeps its
/// files, `image` what sandboxes run.
#[must_use]
pub fn containerd(root: &str, socket: &str, image: &str) -> String {
    format!(
        r#"
version = 2
root = "{root}"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"#
    )
}

/// A runtime's socket.
#[derive(Debug, Clone)]
pub struct Cri {
    socket: PathBuf,
}

impl Cri {
    /// The runtime that listens there.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Calls a method of `runtime.v1.RuntimeService`.
    ///
    /// # Errors
    /// When the runtime refuses; why, it writes to its log.
    pub fn call(&self, method: &str, request: &Message) -> Result<Message> {
        self.exchange(method, request).with_context(|| format!("CRI {method}"))
    }

    fn exchange(&self, method: &str, request: &Message) -> Result<Message> {
        let mut stream = UnixStream::connect(&self.socket).with_context(|| self.socket.display().to_string())?;
        stream.set_read_timeout(Some(patience(TIME_LIMIT)))?;
        stream.set_write_timeout(Some(patience(TIME_LIMIT)))?;
        let mut headers = Vec::new();
        for (name, value) in [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", format!("/runtime.v1.RuntimeService/{method}").as_str()),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ] {
            // Literal field without indexing, new name, no Huffman code (RFC 7541, section 6.2.2): lengths below 127.
            headers.push(0);
            for part in [name, value] {
                headers.push(u8::try_from(part.len()).ok().filter(|it| *it < 127).context("a header is too long")?);
                headers.extend_from_slice(part.as_bytes());
            }
        }
        let mut data = vec![0];
        data.extend_from_slice(&u32::try_from(request.0.len())?.to_be_bytes());
        data.extend_from_slice(&request.0);
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")?;
        send(&mut stream, frame::SETTINGS, 0, 0, &[])?;
        send(&mut stream, frame::HEADERS, frame::END_HEADERS, 1, &headers)?;
        send(&mut stream, frame::DATA, frame::END_STREAM, 1, &data)?;
        let mut answer = Vec::new();
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).context("reading the answer")?;
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let mut payload = vec![0; length];
            stream.read_exact(&mut payload).context("reading the answer")?;
            let (kind, flags) = (head[3], head[4]);
            match kind {
                frame::DATA => answer.extend_from_slice(&payload),
                frame::SETTINGS if flags & frame::ACKNOWLEDGED == 0 => {
                    send(&mut stream, frame::SETTINGS, frame::ACKNOWLEDGED, 0, &[])?;
                }
                frame::PING if flags & frame::ACKNOWLEDGED == 0 => {
                    send(&mut stream, frame::PING, frame::ACKNOWLEDGED, 0, &payload)?;
                }
                frame::RESET | frame::GO_AWAY => bail!("the runtime broke the call off"),
                _ => {}
            }
            if matches!(kind, frame::DATA | frame::HEADERS) && flags & frame::END_STREAM != 0 {
                break;
            }
        }
        // A refusal is trailers alone.
        ensure!(answer.len() >= 5, "the runtime refuses; see its log");
        Ok(Message(answer.split_off(5)))
    }
}

fn send(stream: &mut UnixStream, kind: u8, flags: u8, stream_id: u32, payload: &[u8]) -> Result<()> {
    let length = u32::try_from(payload.len())?.to_be_bytes();
    ensure!(length[0] == 0 && payload.len() <= 16_384, "a frame of {} bytes is too long", payload.len());
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream_id.to_be_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame).context("sending the request")
}
