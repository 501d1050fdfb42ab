//! TCP: verified transfers, a flow in the background, throughput.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::payload;
use crate::netns::Netns;
use crate::patience;

/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection may stand still before it counts as broken.
const STALL_LIMIT: Duration = Duration::from_secs(20);

/// Bytes of one write at most.
const CHUNK: usize = 64 << 10;

/// Writes per second of a flow, unless that makes them too large: a stall is told no finer.
const WRITES_PER_SECOND: u32 = 50;

/// A finished transfer.
#[derive(Debug, Clone, Copy)]
pub struct Transfer {
    /// Bytes that went there and came back, verified.
    pub bytes: u64,
    /// From the connection's start to the last byte.
    pub elapsed: Duration,
    /// The longest time in which nothing came back.
    pub largest_stall: Duration,
    /// The client's address as the client sees it.
    pub from: SocketAddr,
}

/// Connects from a namespace.
///
/// # Errors
/// When the connection is refused or not made within `limit`, with [`patience`]; the cause is an [`std::io::Error`].
pub fn connect(netns: &Netns, to: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let stream = netns.run(|| TcpStream::connect_timeout(&to, patience(limit)))?;
    let stream = stream.with_context(|| format!("connecting to {to} from {}", netns.name()))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience(STALL_LIMIT)))?;
    stream.set_write_timeout(Some(patience(STALL_LIMIT)))?;
    Ok(stream)
}

/// Sends `bytes` to an [`EchoServer`](super::EchoServer) and verifies every byte that comes back.
///
/// # Errors
/// When the connection is not made within five seconds, stands still, breaks, or brings a wrong byte.
pub fn transfer(netns: &Netns, to: SocketAddr, bytes: u64) -> Result<Transfer> {
    let started = Instant::now();
    let stream = connect(netns, to, CONNECT_LIMIT)?;
    let from = stream.local_addr()?;
    let (echoed, largest_stall) = thread::scope(|scope| {
        let writer = scope.spawn(|| write(&stream, bytes, CHUNK, Duration::ZERO, &|| true));
        let read = read_back(&stream);
        let written = writer.join().map_err(|_| anyhow!("the writer panicked"))?;
        // The reader's error tells more, unless the writer failed first and left it waiting.
        let read = read.and_then(|read| written.map(|_| read));
        read.with_context(|| format!("transferring {bytes} bytes to {to} from {} and back", netns.name()))
    })?;
    ensure!(echoed == bytes, "{echoed} of {bytes} bytes came back from {to}");
    Ok(Transfer { bytes, elapsed: started.elapsed(), largest_stall, from })
}

/// A connection to an [`EchoServer`](super::EchoServer) on which bytes go back and forth until it is stopped.
#[derive(Debug)]
pub struct Flow {
    started: Instant,
    from: SocketAddr,
    stop: Arc<AtomicBool>,
    writer: Option<JoinHandle<Result<u64>>>,
    reader: Option<JoinHandle<Result<(u64, Duration)>>>,
}

impl Flow {
    /// Connects and sends about this many bytes per second.
    ///
    /// # Errors
    /// When the connection cannot be made.
    pub fn start(netns: &Netns, to: SocketAddr, bytes_per_second: u32) -> Result<Self> {
        let stream = Arc::new(connect(netns, to, CONNECT_LIMIT)?);
        let from = stream.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let chunk = (bytes_per_second / WRITES_PER_SECOND).clamp(1, u32::try_from(CHUNK)?);
        let pause = Duration::from_secs(1) * chunk / bytes_per_second.max(1);
        let chunk = usize::try_from(chunk)?;
        let writer = thread::spawn({
            let (stream, stop) = (Arc::clone(&stream), Arc::clone(&stop));
            move || write(&stream, u64::MAX, chunk, pause, &|| !stop.load(Ordering::Relaxed))
        });
        let reader = thread::spawn(move || read_back(&stream));
        Ok(Self { started: Instant::now(), from, stop, writer: Some(writer), reader: Some(reader) })
    }

    /// Stops sending, waits until everything came back, and reports.
    ///
    /// # Errors
    /// When the connection stood still, broke, or brought a wrong byte at any time.
    pub fn stop(mut self) -> Result<Transfer> {
        self.stop.store(true, Ordering::Relaxed);
        let panicked = || anyhow!("a thread of the flow panicked");
        let read = self.reader.take().map(JoinHandle::join).transpose().map_err(|_| panicked())?;
        let written = self.writer.take().map(JoinHandle::join).transpose().map_err(|_| panicked())?;
        let (echoed, largest_stall) = read.unwrap_or(Ok((0, Duration::ZERO)))?;
        let bytes = written.unwrap_or(Ok(0))?;
        ensure!(echoed == bytes, "{echoed} of {bytes} bytes came back");
        Ok(Transfer { bytes, elapsed: self.started.elapsed(), largest_stall, from: self.from })
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        // The threads end by themselves, at the latest when the connection has stood still for too long.
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Bits per second that a receiver at `to`, an address of the namespace `receiver`, gets in about `time`.
///
/// # Errors
/// When the connection cannot be made or breaks.
pub fn throughput(sender: &Netns, receiver: &Netns, to: IpAddr, time: Duration) -> Result<f64> {
    let listener = receiver.run(|| TcpListener::bind((to, 0)))?;
    let listener = listener.with_context(|| format!("receiving at {to} in {}", receiver.name()))?;
    let port = listener.local_addr()?.port();
    let sending = connect(sender, SocketAddr::new(to, port), CONNECT_LIMIT)?;
    let (mut receiving, _) = listener.accept().context("accepting the connection")?;
    receiving.set_read_timeout(Some(patience(STALL_LIMIT)))?;
    let started = Instant::now();
    thread::scope(|scope| {
        let writer = scope.spawn(|| -> std::io::Result<()> {
            let chunk = payload::of_length(CHUNK);
            while started.elapsed() < time {
                (&sending).write_all(&chunk)?;
            }
            sending.shutdown(Shutdown::Write)
        });
        let mut buffer = vec![0; CHUNK];
        let mut bytes = 0;
        loop {
            match receiving.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => bytes += length,
                // A read with a time limit is not begun anew after a signal (signal(7)).
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("receiving"),
            }
        }
        let elapsed = started.elapsed();
        writer.join().map_err(|_| anyhow!("the writer panicked"))?.context("sending")?;
        Ok(bytes as f64 * 8.0 / elapsed.as_secs_f64())
    })
}

/// Writes up to `bytes`, a chunk after each pause, as long as `go_on` says so; returns how many.
fn write(mut stream: &TcpStream, bytes: u64, chunk: usize, pause: Duration, go_on: &dyn Fn() -> bool) -> Result<u64> {
    let mut buffer = vec![0; chunk];
    let mut written = 0;
    while written < bytes && go_on() {
        let length = usize::try_from(bytes - written).unwrap_or(chunk).min(chunk);
        payload::fill(written, &mut buffer[..length]);
        stream.write_all(&buffer[..length]).with_context(|| format!("sending after {written} bytes"))?;
        written += length as u64;
        if !pause.is_zero() {
            thread::sleep(pause);
        }
    }
    stream.shutdown(Shutdown::Write).context("ending the stream")?;
    Ok(written)
}

/// Reads to the end and verifies every byte; returns their number and the longest wait.
fn read_back(mut stream: &TcpStream) -> Result<(u64, Duration)> {
    let mut buffer = vec![0; CHUNK];
    let (mut bytes, mut largest_stall, mut last) = (0, Duration::ZERO, Instant::now());
    loop {
        let length = match stream.read(&mut buffer) {
            Ok(0) => return Ok((bytes, largest_stall)),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).with_context(|| format!("nothing more after {bytes} bytes")),
        };
        largest_stall = largest_stall.max(last.elapsed());
        last = Instant::now();
        payload::verify(bytes, &buffer[..length])?;
        bytes += length as u64;
    }
}
