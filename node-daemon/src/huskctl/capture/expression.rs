//! What people write after `--filter`: the simplest of what tcpdump knows.

use husk_dataplane::capture::{Filter, Test};
use husk_overlay::prefix::Prefix;

/// Reads an expression.
///
/// # Errors
/// When it is none; says what would be.
pub(super) fn parse(text: &str) -> Result<Filter, String> {
    let mut words = text.split_whitespace();
    let mut clauses = Vec::new();
    let missing = |what: &str, word: &str| format!("{what} is missing after {word:?}");
    while let Some(word) = words.next() {
        let mut value = |what: &str| words.next().ok_or_else(|| missing(what, word));
        let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number that {word} can have"));
        let clause = match word {
            "host" => {
                let text = value("an address")?;
                let address = text.parse().map_err(|_| format!("{text:?} is no address"))?;
                vec![Test::Address(Prefix::host(address))]
            }
            "net" => {
                let text = value("a prefix")?;
                vec![Test::Address(text.parse().map_err(|error| format!("{text:?} is no prefix: {error}"))?)]
            }
            "port" => {
                let text = value("a number")?;
                vec![Test::Port(text.parse().map_err(|_| format!("{text:?} is no port"))?)]
            }
            "proto" => vec![Test::Protocol(number(value("a number")?)?)],
            "tcp" => vec![Test::Protocol(6)],
            "udp" => vec![Test::Protocol(17)],
            "sctp" => vec![Test::Protocol(132)],
            "esp" => vec![Test::Protocol(50)],
            // ICMP, and ICMPv6.
            "icmp" => vec![Test::Protocol(1), Test::Protocol(58)],
            other => {
                return Err(format!(
                    "{other:?} is not known; host ADDRESS, net PREFIX, port NUMBER, proto NUMBER, tcp, udp, sctp, icmp and esp \
                     are, joined with and"
                ));
            }
        };
        clauses.push(clause);
        match words.next() {
            None => return Ok(Filter { clauses }),
            Some("and") => {}
            Some(other) => return Err(format!("and is expected before {other:?}")),
        }
    }
    Err("an expression is missing".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_meant() {
        let filter = parse("host 10.0.0.1 and port 80 and tcp").unwrap();
        let host = Test::Address("10.0.0.1/32".parse().unwrap());
        assert_eq!(filter.clauses, [vec![host], vec![Test::Port(80)], vec![Test::Protocol(6)]]);
        assert_eq!(parse("icmp").unwrap().clauses, [vec![Test::Protocol(1), Test::Protocol(58)]]);
        assert_eq!(parse("net fd00::/8").unwrap().clauses, [vec![Test::Address("fd00::/8".parse().unwrap())]]);
        assert_eq!(parse("proto 47").unwrap().clauses, [vec![Test::Protocol(47)]]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, told) in [
            ("", "missing"),
            ("host", "an address is missing after \"host\""),
            ("host a", "\"a\" is no address"),
            ("net 10.0.0.0/33", "is no prefix"),
            ("port 65536", "is no port"),
            ("proto 256", "is no number that proto can have"),
            ("tcp udp", "and is expected before \"udp\""),
            ("tcp and", "an expression is missing"),
            ("tcp or udp", "and is expected"),
            ("greater 100", "\"greater\" is not known"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(told), "{text:?}: {error}");
        }
    }
}
