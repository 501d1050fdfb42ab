//! HTTP as a client inside a network namespace speaks it: one request, one answer.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;
use crate::patience;

/// How long a server may take.
const LIMIT: Duration = Duration::from_secs(15);

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Headers, their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Body.
    pub body: String,
}

/// Asks for a path with these further headers.
///
/// # Errors
/// When nobody listens, or what answers does not speak HTTP.
pub fn get(netns: &Netns, at: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
    let further: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let host = if headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        String::new()
    } else {
        format!("Host: {at}\r\n")
    };
    let answer = send(netns, at, format!("GET {path} HTTP/1.1\r\n{host}{further}\r\n").as_bytes())?;
    parse(&answer).with_context(|| format!("{at}{path} answers no HTTP: {answer:?}"))
}

/// Asks for a path in HTTP/1.0, which knows neither chunks nor connections that stay open: the body is what comes until the end.
///
/// # Errors
/// When nobody listens, or what answers does not speak HTTP.
pub fn get_whole(netns: &Netns, at: SocketAddr, path: &str) -> Result<Answer> {
    let answer = send(netns, at, format!("GET {path} HTTP/1.0\r\nHost: {at}\r\n\r\n").as_bytes())?;
    parse(&answer).with_context(|| format!("{at}{path} answers no HTTP: {answer:?}"))
}

/// Sends bytes, and takes what comes until the server closes.
///
/// # Errors
/// When nobody listens, or it takes too long.
pub fn send(netns: &Netns, at: SocketAddr, request: &[u8]) -> Result<String> {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect_timeout(&at, patience(LIMIT))?;
        stream.set_read_timeout(Some(patience(LIMIT)))?;
        stream.write_all(request)?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = netns.run(exchange)?.with_context(|| format!("asking {at} in {}", netns.name()))?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.lines();
    let status = lines.next()?.strip_prefix("HTTP/1.")?.get(2..)?.split(' ').next()?.parse().ok()?;
    let headers = lines.filter_map(|line| line.split_once(": "));
    let headers = headers.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    Some(Answer { status, headers, body: body.to_owned() })
}
