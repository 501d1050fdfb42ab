//! Whether a host is there, asked without any privilege: an attempt to connect to a TCP port, which the host's kernel accepts or refuses.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::trace::Knock;

/// How long the other host may take to answer.
const KNOCKING: Duration = Duration::from_secs(1);

/// Tries to connect; none if nothing could be sent that would tell.
pub(crate) fn knock(address: SocketAddr) -> Option<Knock> {
    match TcpStream::connect_timeout(&address, KNOCKING) {
        Ok(_) => Some(Knock::Answered),
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset => Some(Knock::Answered),
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Some(Knock::Silent),
            ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Some(Knock::NoWay),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_port_and_a_closed_one_both_answer() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(knock(address), Some(Knock::Answered));
        drop(listener);
        assert_eq!(knock(address), Some(Knock::Answered));
    }
}
