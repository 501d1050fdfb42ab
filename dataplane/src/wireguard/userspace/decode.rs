//! From the text of an answer to a state.

use std::str::FromStr;
use std::time::Duration;

use husk_overlay::keys::{PrivateKey, PublicKey};
use husk_overlay::prefix::Prefix;
use zeroize::Zeroizing;

use super::super::{WireguardState, unconfigured};

/// The state and the error number of an answer. A reason for failure never repeats a value, which may be a key.
pub(super) fn answer(bytes: &[u8]) -> Result<(WireguardState, i32), String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not text".to_owned())?;
    let mut state = WireguardState::default();
    let mut errno = None;
    let mut current: Option<PublicKey> = None;
    for line in text.lines().take_while(|line| !line.is_empty()) {
        let (key, value) = line.split_once('=').ok_or("a line without `=`")?;
        match key {
            "errno" => errno = Some(number(key, value)?),
            "private_key" => state.public_key = public_half(value)?,
            "listen_port" => state.listen_port = number(key, value)?,
            "fwmark" => state.firewall_mark = firewall_mark(value)?,
            "public_key" => {
                let key = public_key(value)?;
                state.peers.entry(key).or_insert_with(unconfigured);
                state.status.entry(key).or_default();
                current = Some(key);
            }
            _ => {
                if let Some(peer) = current {
                    peer_line(&mut state, peer, key, value)?;
                }
            }
        }
    }
    // Zero stands for a time that never was, not for the epoch.
    for status in state.status.values_mut() {
        status.last_handshake = status.last_handshake.filter(|time| !time.is_zero());
    }
    errno.map(|errno| (state, errno)).ok_or_else(|| "it ends without `errno`".to_owned())
}

fn peer_line(state: &mut WireguardState, public_key: PublicKey, key: &str, value: &str) -> Result<(), String> {
    let peer = state.peers.entry(public_key).or_insert_with(unconfigured);
    let status = state.status.entry(public_key).or_default();
    let handshake = status.last_handshake.unwrap_or_default();
    match key {
        "preshared_key" if value.bytes().any(|digit| digit != b'0') => {
            state.preshared.insert(public_key);
        }
        // An address with the name of an interface behind it cannot be taken over; then it counts as none.
        "endpoint" => {
            peer.endpoint = value.parse().ok();
            status.endpoint = peer.endpoint;
        }
        "persistent_keepalive_interval" => peer.keepalive = number(key, value)?,
        "allowed_ip" => {
            let prefix: Prefix = value.parse().map_err(|_| "an `allowed_ip` is not a prefix".to_owned())?;
            peer.allowed_ips.insert(prefix);
        }
        "last_handshake_time_sec" => {
            status.last_handshake = Some(Duration::new(number(key, value)?, handshake.subsec_nanos()));
        }
        "last_handshake_time_nsec" => {
            let nanoseconds: u32 = number(key, value)?;
            let nanoseconds = Some(nanoseconds).filter(|it| *it < 1_000_000_000);
            let nanoseconds = nanoseconds.ok_or("a `last_handshake_time_nsec` of a second or more")?;
            status.last_handshake = Some(Duration::new(handshake.as_secs(), nanoseconds));
        }
        "rx_bytes" => status.received_bytes = number(key, value)?,
        "tx_bytes" => status.sent_bytes = number(key, value)?,
        // The protocol may grow.
        _ => {}
    }
    Ok(())
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("`{key}` is not a number of the right size"))
}

/// Decimal by the protocol; some processes print hexadecimal.
fn firewall_mark(value: &str) -> Result<u32, String> {
    match value.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).map_err(|_| "`fwmark` is not a number".to_owned()),
        None if value.is_empty() => Ok(0),
        None => number("fwmark", value),
    }
}

fn public_key(value: &str) -> Result<PublicKey, String> {
    let bytes = bytes("public_key", value)?;
    PublicKey::from_bytes(*bytes).map_err(|error| error.to_string())
}

/// The public half of the private key; none for all zeroes, by which a process says that it has none.
fn public_half(value: &str) -> Result<Option<PublicKey>, String> {
    let bytes = bytes("private_key", value)?;
    Ok(PrivateKey::from_random(*bytes).ok().map(|key| key.public()))
}

fn bytes(key: &str, value: &str) -> Result<Zeroizing<[u8; 32]>, String> {
    let refused = || format!("`{key}` is not 64 hexadecimal digits");
    let digits = value.as_bytes();
    if digits.len() != 64 {
        return Err(refused());
    }
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = [pair[0], pair[1]].map(|digit| char::from(digit).to_digit(16));
        let value = high.zip(low).map(|(high, low)| high * 16 + low).ok_or_else(refused)?;
        *byte = u8::try_from(value).map_err(|_| refused())?;
    }
    Ok(bytes)
}
