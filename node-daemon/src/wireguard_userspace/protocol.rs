//! The text of the cross-platform WireGuard control protocol (<https://www.wireguard.com/xplatform/>): lines
//! `key=value`, a blank line ends a request and a response.
//!
//! Errors name the line and what is wrong with it, never its text: any line may hold a key.

use std::net::SocketAddr;

use husk_overlay::keys::PublicKey;
use husk_overlay::prefix::Prefix;
use nix::errno::Errno;
use zeroize::Zeroizing;

/// 32 secret bytes, wiped when dropped.
pub(super) type Secret = Zeroizing<[u8; 32]>;

/// A request that was understood. Deliberately without `Debug`: it carries keys.
pub(super) enum Request {
    Get,
    Set(Set),
}

/// Changes to the device.
#[derive(Default)]
pub(super) struct Set {
    /// All zero asks for the removal of the key.
    pub(super) private_key: Option<Secret>,
    pub(super) listen_port: Option<u16>,
    /// Zero asks for the removal of the mark.
    pub(super) fwmark: Option<u32>,
    pub(super) replace_peers: bool,
    pub(super) peers: Vec<PeerChange>,
}

/// Changes to a peer.
pub(super) struct PeerChange {
    pub(super) public_key: PublicKey,
    pub(super) remove: bool,
    pub(super) update_only: bool,
    /// All zero asks for the removal of the key.
    pub(super) preshared_key: Option<Secret>,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) keepalive: Option<u16>,
    pub(super) replace_allowed_ips: bool,
    pub(super) allowed_ips: Vec<AllowedIp>,
}

/// A change to a peer's allowed addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AllowedIp {
    Add(Prefix),
    Remove(Prefix),
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Refusal {
    pub(super) errno: Errno,
    pub(super) reason: String,
}

impl Refusal {
    pub(super) fn new(errno: Errno, reason: impl Into<String>) -> Self {
        Self { errno, reason: reason.into() }
    }
}

impl PeerChange {
    fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            replace_allowed_ips: false,
            allowed_ips: Vec::new(),
        }
    }
}

/// Reads one request, without its final blank line. Nothing of a request with an error is applied.
pub(super) fn parse(text: &str) -> Result<Request, Refusal> {
    let mut lines = text.lines().zip(1_usize..);
    match lines.next() {
        Some(("get=1", _)) if lines.next().is_none() => Ok(Request::Get),
        Some(("set=1", _)) => {
            let mut set = Set::default();
            for (line, number) in lines {
                read_line(&mut set, line)
                    .map_err(|reason| Refusal::new(Errno::EINVAL, format!("line {number}: {reason}")))?;
            }
            Ok(Request::Set(set))
        }
        _ => Err(Refusal::new(Errno::EINVAL, "line 1: a request is `get=1` alone or starts with `set=1`")),
    }
}

fn read_line(set: &mut Set, line: &str) -> Result<(), &'static str> {
    let (key, value) = line.split_once('=').ok_or("not of the form key=value")?;
    if key == "public_key" {
        let bytes = hexadecimal(value).ok_or("public_key is not 64 hexadecimal digits")?;
        let public_key = PublicKey::from_bytes(*bytes).map_err(|_| "public_key is all zero")?;
        set.peers.push(PeerChange::new(public_key));
        return Ok(());
    }
    match set.peers.last_mut() {
        Some(peer) => read_peer_line(peer, key, value),
        None => read_device_line(set, key, value),
    }
}

fn read_device_line(set: &mut Set, key: &str, value: &str) -> Result<(), &'static str> {
    match key {
        "private_key" => {
            set.private_key = Some(hexadecimal(value).ok_or("private_key is not 64 hexadecimal digits")?);
        }
        "listen_port" => set.listen_port = Some(value.parse().map_err(|_| "listen_port is not a port number")?),
        "fwmark" => set.fwmark = Some(mark(value).ok_or("fwmark is not a number of 32 bits")?),
        "replace_peers" => set.replace_peers = yes(value).ok_or("replace_peers can only be true")?,
        "protocol_version" => version(value)?,
        _ => return Err("unknown key before the first public_key"),
    }
    Ok(())
}

fn read_peer_line(peer: &mut PeerChange, key: &str, value: &str) -> Result<(), &'static str> {
    match key {
        "remove" => peer.remove = yes(value).ok_or("remove can only be true")?,
        "update_only" => peer.update_only = yes(value).ok_or("update_only can only be true")?,
        "preshared_key" => {
            peer.preshared_key = Some(hexadecimal(value).ok_or("preshared_key is not 64 hexadecimal digits")?);
        }
        "endpoint" => {
            peer.endpoint = Some(value.parse().map_err(|_| "endpoint is not address:port or [address]:port")?);
        }
        "persistent_keepalive_interval" => {
            peer.keepalive = Some(value.parse().map_err(|_| "persistent_keepalive_interval is not 0 to 65535")?);
        }
        "replace_allowed_ips" => {
            peer.replace_allowed_ips = yes(value).ok_or("replace_allowed_ips can only be true")?;
        }
        "allowed_ip" => peer.allowed_ips.push(allowed_ip(value).ok_or("allowed_ip is not address/length")?),
        "protocol_version" => version(value)?,
        _ => return Err("unknown key behind a public_key"),
    }
    Ok(())
}

fn yes(value: &str) -> Option<bool> {
    (value == "true").then_some(true)
}

fn version(value: &str) -> Result<(), &'static str> {
    if value == "1" { Ok(()) } else { Err("protocol_version is not 1, the only one there is") }
}

fn mark(value: &str) -> Option<u32> {
    match value.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None if value.is_empty() => Some(0),
        None => value.parse().ok(),
    }
}

/// A leading minus removes the prefix from the peer; tools use it where the kernel has `WGALLOWEDIP_F_REMOVE_ME`. Host
/// bits are cleared, as the kernel does.
fn allowed_ip(value: &str) -> Option<AllowedIp> {
    let (prefix, change): (_, fn(Prefix) -> AllowedIp) = match value.strip_prefix('-') {
        Some(rest) => (rest, AllowedIp::Remove),
        None => (value, AllowedIp::Add),
    };
    let (address, length) = prefix.split_once('/')?;
    let prefix = Prefix::containing(address.parse().ok()?, length.parse().ok()?).ok()?;
    Some(change(prefix))
}

fn hexadecimal(value: &str) -> Option<Secret> {
    let digits = value.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = Secret::default();
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

fn digit(character: u8) -> Option<u8> {
    match character {
        b'0'..=b'9' => Some(character - b'0'),
        b'a'..=b'f' => Some(character - b'a' + 10),
        b'A'..=b'F' => Some(character - b'A' + 10),
        _ => None,
    }
}

/// Appends `key=` and the bytes in hexadecimal.
pub(super) fn write_key(text: &mut String, key: &str, bytes: &[u8; 32]) {
    text.push_str(key);
    text.push('=');
    for byte in bytes {
        for nibble in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(nibble)]));
        }
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(text: &str) -> Set {
        match parse(text) {
            Ok(Request::Set(set)) => set,
            Ok(Request::Get) => panic!("not a set: {text}"),
            Err(refusal) => panic!("{refusal}: {text}"),
        }
    }

    #[test]
    fn reads_what_wg_writes() {
        let (own, peer) = ("77".repeat(32), "0a".repeat(32));
        let set = set(&format!(
            "set=1\nprivate_key={own}\nlisten_port=51820\nfwmark=0x10\nreplace_peers=true\npublic_key={peer}\n\
             update_only=true\npreshared_key={own}\nendpoint=[fd00::1]:51820\npersistent_keepalive_interval=25\n\
             replace_allowed_ips=true\nallowed_ip=10.0.0.9/24\nallowed_ip=-fd00::/64\npublic_key={own}\nremove=true\n"
        ));
        assert_eq!(set.private_key.as_deref(), Some(&[0x77; 32]));
        assert_eq!((set.listen_port, set.fwmark, set.replace_peers), (Some(51820), Some(16), true));
        let [first, second] = set.peers.as_slice() else { panic!("two peers") };
        assert_eq!(first.public_key.as_bytes(), &[0x0a; 32]);
        assert!(first.update_only && first.replace_allowed_ips && !first.remove && second.remove);
        assert_eq!(first.endpoint, "[fd00::1]:51820".parse().ok());
        assert_eq!(first.keepalive, Some(25));
        let expected =
            [AllowedIp::Add("10.0.0.0/24".parse().unwrap()), AllowedIp::Remove("fd00::/64".parse().unwrap())];
        assert_eq!(first.allowed_ips, expected);
        assert!(matches!(parse("get=1\n"), Ok(Request::Get)));
    }

    #[test]
    fn a_refusal_names_the_line_and_hides_its_text() {
        let secret = "5e".repeat(31);
        for bad in [
            format!("set=1\nprivate_key={secret}\n"),
            format!("set=1\nprivat_key={secret}\n"),
            format!("set=1\n{secret}\n"),
            format!("set=1 \nprivate_key={secret}\n"),
            format!("set=1\nlisten_port=1\npublic_key={secret}00\npreshared_key={secret}\n"),
            "get=1\nprivate_key=x\n".to_owned(),
            "set=1\nreplace_peers=false\n".to_owned(),
            "set=1\nprotocol_version=2\n".to_owned(),
            String::new(),
        ] {
            let refusal = parse(&bad).err().map(|refusal| refusal.to_string()).unwrap_or_default();
            assert!(refusal.starts_with("line ") && !refusal.contains("5e5e"), "{bad:?}: {refusal}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(lines in prop::collection::vec("[a-z_]{0,12}=?\\PC{0,70}", 0..8)) {
            let _ = parse(&lines.join("\n"));
            let _ = parse(&format!("set=1\n{}\n", lines.join("\n")));
        }

        #[test]
        fn keys_round_trip(bytes: [u8; 32]) {
            let mut text = String::from("set=1\n");
            write_key(&mut text, "private_key", &bytes);
            let read = set(&text).private_key;
            prop_assert_eq!(read.as_deref(), Some(&bytes));
        }
    }
}
