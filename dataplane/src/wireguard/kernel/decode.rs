//! From the records of a dump to one state.

use std::net::{SocketAddr, SocketAddrV6};
use std::time::Duration;

use husk_overlay::keys::PublicKey;
use husk_overlay::prefix::Prefix;
use netlink_packet_wireguard::{
    WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardPeer as PeerRecord,
    WireguardPeerAttribute, WireguardTimeSpec,
};

use super::super::{WireguardState, unconfigured};

/// Puts the attributes of all messages of a dump together. An error never repeats a value.
pub(super) fn merge<'a>(attributes: impl Iterator<Item = &'a WireguardAttribute>) -> Result<WireguardState, String> {
    let mut state = WireguardState::default();
    for attribute in attributes {
        match attribute {
            WireguardAttribute::PublicKey(bytes) => state.public_key = Some(public_key(bytes)?),
            WireguardAttribute::ListenPort(port) => state.listen_port = *port,
            WireguardAttribute::Fwmark(mark) => state.firewall_mark = *mark,
            WireguardAttribute::Peers(peers) => {
                for peer in peers {
                    merge_peer(&mut state, peer)?;
                }
            }
            _ => {}
        }
    }
    Ok(state)
}

fn merge_peer(state: &mut WireguardState, record: &PeerRecord) -> Result<(), String> {
    let key = record.0.iter().find_map(|attribute| match attribute {
        WireguardPeerAttribute::PublicKey(bytes) => Some(bytes),
        _ => None,
    });
    let key = public_key(key.ok_or("a peer has no public key")?)?;
    let peer = state.peers.entry(key).or_insert_with(unconfigured);
    let status = state.status.entry(key).or_default();
    for attribute in &record.0 {
        match attribute {
            WireguardPeerAttribute::Endpoint(endpoint) => {
                peer.endpoint = Some(without_flow_label(*endpoint));
                status.endpoint = peer.endpoint;
            }
            WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.keepalive = *seconds,
            WireguardPeerAttribute::PresharedKey(preshared) if *preshared != [0; 32] => {
                state.preshared.insert(key);
            }
            WireguardPeerAttribute::LastHandshake(time) => status.last_handshake = since_epoch(*time),
            WireguardPeerAttribute::RxBytes(bytes) => status.received_bytes = *bytes,
            WireguardPeerAttribute::TxBytes(bytes) => status.sent_bytes = *bytes,
            WireguardPeerAttribute::AllowedIps(all) => {
                for allowed_ip in all {
                    peer.allowed_ips.insert(prefix(allowed_ip)?);
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn public_key(bytes: &[u8; 32]) -> Result<PublicKey, String> {
    PublicKey::from_bytes(*bytes).map_err(|error| error.to_string())
}

/// The kernel copies the flow label of the last packet into the endpoint; it is no part of the address.
fn without_flow_label(endpoint: SocketAddr) -> SocketAddr {
    match endpoint {
        SocketAddr::V6(it) => SocketAddrV6::new(*it.ip(), it.port(), 0, it.scope_id()).into(),
        SocketAddr::V4(_) => endpoint,
    }
}

/// All zero means that there was no handshake.
fn since_epoch(time: WireguardTimeSpec) -> Option<Duration> {
    let seconds = u64::try_from(time.seconds).ok()?;
    let nanoseconds = u32::try_from(time.nano_seconds).ok().filter(|it| *it < 1_000_000_000)?;
    (seconds != 0 || nanoseconds != 0).then(|| Duration::new(seconds, nanoseconds))
}

fn prefix(allowed_ip: &WireguardAllowedIp) -> Result<Prefix, String> {
    let (mut address, mut length) = (None, None);
    for attribute in &allowed_ip.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(it) => address = Some(*it),
            WireguardAllowedIpAttr::Cidr(it) => length = Some(*it),
            _ => {}
        }
    }
    let (address, length) = address.zip(length).ok_or("an allowed-ip lacks its address or length")?;
    Prefix::containing(address, length).map_err(|error| error.to_string())
}
