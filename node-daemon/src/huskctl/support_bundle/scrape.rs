//! The daemon's metrics, as Prometheus would get them, within limits of time and size.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Instant;

use husk_overlay::config::MetricsConfig;

use super::items::Places;
use crate::programs::{Kept, Limits};

/// Environment variable in which the manifests tell the daemon at which address to serve.
const ADDRESS: &str = "HUSK_METRICS_ADDRESS";

/// Largest head of an answer, in bytes.
const HEAD: u64 = 16 << 10;

/// Where the daemon serves them; none where it is told not to.
pub(super) fn address(places: &Places) -> Option<SocketAddr> {
    let configured = match places.text(&["metrics", "listen"]) {
        Some(listen) => listen.parse().ok(),
        None => MetricsConfig::default().listen,
    };
    reached(configured?, std::env::var(ADDRESS).ok().and_then(|address| address.parse().ok()))
}

/// Where a server that listens there is reached on its own host.
fn reached(configured: SocketAddr, instead: Option<IpAddr>) -> Option<SocketAddr> {
    let address = match instead.unwrap_or(configured.ip()) {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        address => address,
    };
    (configured.port() > 0).then(|| SocketAddr::new(address, configured.port()))
}

/// What is served there.
pub(super) fn scrape(address: SocketAddr, limits: Limits) -> Result<Kept, String> {
    let failed = |error: io::Error| format!("cannot get http://{address}/metrics: {error}");
    let over = Instant::now() + limits.time;
    let mut stream = TcpStream::connect_timeout(&address, limits.time).map_err(failed)?;
    stream.set_write_timeout(Some(limits.time)).map_err(failed)?;
    stream.set_read_timeout(Some(limits.time)).map_err(failed)?;
    // Of HTTP/1.0 the answer ends with the connection, and has no parts.
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").map_err(failed)?;
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let line = reader.by_ref().take(HEAD).read_line(&mut head).map_err(failed)?;
        if line == 0 || head.len() as u64 > HEAD {
            return Err(failed(io::ErrorKind::InvalidData.into()));
        }
    }
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        return Err(failed(io::Error::other(format!("status {status}"))));
    }
    let most = usize::try_from(limits.bytes).unwrap_or(usize::MAX);
    let mut content = Vec::new();
    loop {
        // Who sends a little now and then does not hold it up either.
        let left = over.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        reader.get_ref().set_read_timeout(Some(left)).map_err(failed)?;
        let part = reader.fill_buf().map_err(failed)?;
        let length = part.len();
        content.extend_from_slice(part);
        reader.consume(length);
        if length == 0 || content.len() > most {
            let truncated = content.len() > most;
            content.truncate(most);
            return Ok(Kept { content, truncated });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// A server that gives these answers, one after the other, and closes.
    fn serving(answers: &'static [&'static str]) -> (SocketAddr, thread::JoinHandle<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let serve = move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let request = BufReader::new(stream.try_clone().unwrap()).lines();
                assert!(request.map_while(Result::ok).any(|line| line.is_empty()));
                stream.write_all(answer.as_bytes()).unwrap();
            }
        };
        (address, thread::spawn(serve))
    }

    const LIMITS: Limits = Limits { time: Duration::from_secs(60), bytes: 10 };

    #[test]
    fn what_is_served_is_had_without_its_head_and_within_limits() {
        let answers: &[&str] = &[
            "HTTP/1.0 200 OK\r\nx: y\r\n\r\nup 1\n",
            "HTTP/1.0 200 OK\r\n\r\nlonger than ten",
            "HTTP/1.0 503 no\r\n\r\n",
            "nonsense",
        ];
        let (address, server) = serving(answers);
        let whole = scrape(address, LIMITS).unwrap();
        assert_eq!((whole.content.as_slice(), whole.truncated), (b"up 1\n".as_slice(), false));
        let cut = scrape(address, LIMITS).unwrap();
        assert_eq!((cut.content.as_slice(), cut.truncated), (b"longer tha".as_slice(), true));
        let errors = [(); 2].map(|()| scrape(address, LIMITS).err().unwrap());
        assert!(errors[0].contains("/metrics: status 503") && errors[1].contains("/metrics: "), "{errors:?}");
        server.join().unwrap();
        // Who accepts and says nothing is not waited for long.
        let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let limits = Limits { time: Duration::from_millis(50), ..LIMITS };
        scrape(silent.local_addr().unwrap(), limits).err().unwrap();
    }

    #[test]
    fn it_is_asked_where_the_daemon_was_told_to_serve() {
        let reached = |listen: &str, instead: Option<&str>| {
            let instead = instead.map(|address| address.parse().unwrap());
            reached(listen.parse().unwrap(), instead).unwrap().to_string()
        };
        assert_eq!(reached("127.0.0.1:9472", None), "127.0.0.1:9472");
        assert_eq!(reached("[::]:9100", None), "[::1]:9100");
        assert_eq!(reached("127.0.0.1:9472", Some("192.0.2.1")), "192.0.2.1:9472");
        assert_eq!(reached("0.0.0.0:1", Some("::")), "[::1]:1");
    }
}
