//! WireGuard devices of the kernel: generic netlink family `wireguard` (include/uapi/linux/wireguard.h).
//!
//! Reading: `WG_CMD_GET_DEVICE` as a dump. The kernel fills a message and goes on in the next; a peer whose allowed-ips do
//! not fit is continued there with nothing but its key and more allowed-ips (`get_peer` in drivers/net/wireguard/netlink.c).
//! So everything is merged by public key.
//!
//! Writing: `WG_CMD_SET_DEVICE`, one message per change and acknowledgement, many messages to a datagram. An allowed-ip that
//! another peer has is taken from it in one step (`add` in drivers/net/wireguard/allowedips.c replaces the node's owner).
//!
//! Taking a single allowed-ip from everybody is the difficult one. `WGPEER_F_REPLACE_ALLOWEDIPS` empties the peer's list and
//! fills it again while packets are looked up without a lock: for a moment the peer has none of its prefixes and packets are
//! lost. `WGALLOWEDIP_F_REMOVE_ME` exists since Linux 6.16 only, and older kernels refuse the attribute. What works
//! everywhere and loses nothing is what the kernel's own change log describes as the alternative: give the prefix to a
//! peer that nobody is, then remove that peer, both in one message.

use husk_overlay::kernel::WireguardPeer;
use husk_overlay::keys::PublicKey;
use husk_overlay::name::InterfaceName;
use husk_overlay::prefix::{Family, Prefix};
use netlink_packet_core::{
    DecodeError, Emitable as _, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer as PeerRecord, WireguardPeerAttribute, WireguardPeerFlags,
};
use nix::errno::Errno;
use zeroize::Zeroize as _;

use super::{KeyRing, WireguardAction, WireguardState, private_key};
use crate::error::Error;
use crate::netlink::{Protocol, Request, Socket};

mod decode;

use decode::merge;

/// Most allowed-ips in one message. One takes up to 40 bytes, and the nested attributes around them must stay below 64 KiB.
const ALLOWED_IPS_PER_MESSAGE: usize = 1000;

/// The kernel's devices of one network namespace.
pub(super) struct KernelDevices {
    socket: Socket,
    /// Number of the generic netlink family, once it is known.
    family: Option<u16>,
}

impl KernelDevices {
    pub(super) fn open() -> Result<Self, Error> {
        Ok(Self { socket: Socket::open(Protocol::Generic)?, family: None })
    }

    /// Number of the family `wireguard`. The kernel loads the module when it does not know the family.
    pub(super) fn family(&mut self) -> Result<u16, Error> {
        if let Some(family) = self.family {
            return Ok(family);
        }
        let attributes = vec![GenlCtrlAttrs::FamilyName("wireguard".to_owned())];
        let message = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: attributes });
        let (operation, object) = ("find", "the kernel's WireGuard".to_owned());
        let request = Request { operation, object: object.clone(), flags: 0, message };
        let answer: GenlMessage<GenlCtrl> = self.socket.get(request).map_err(|error| match error.errno() {
            Some(Errno::ENOENT) => Error::Unsupported {
                operation,
                object: object.clone(),
                reason: "it has none, or the module `wireguard` cannot be loaded".to_owned(),
                remedy: "load the module wireguard, install the kernel's extra modules, or use the bundled userspace device",
            },
            _ => error,
        })?;
        let family = answer.payload.nlas.iter().find_map(|attribute| match attribute {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        let reason = || "the family has no number".to_owned();
        let family = family.ok_or_else(|| Error::Malformed { operation, object, reason: reason() })?;
        self.family = Some(family);
        Ok(family)
    }

    pub(super) fn read(&mut self, interface: &InterfaceName) -> Result<Option<WireguardState>, Error> {
        let family = match self.family() {
            Ok(family) => family,
            // Without the module there can be no device.
            Err(Error::Unsupported { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let (operation, object) = ("read", format!("WireGuard device {interface}"));
        let attributes = vec![WireguardAttribute::IfName(interface.to_string())];
        let message = Message::new(family, WireguardCmd::GetDevice, attributes);
        let answers = match self.socket.dump(Request { operation, object: object.clone(), flags: 0, message }) {
            Ok(answers) => answers,
            Err(error) if error.errno() == Some(Errno::ENODEV) => return Ok(None),
            Err(error) => return Err(error),
        };
        let state = merge(answers.iter().flat_map(|answer| answer.0.payload.attributes.iter()));
        state.map(Some).map_err(|reason| Error::Malformed { operation, object, reason })
    }

    pub(super) fn apply(
        &mut self,
        interface: &InterfaceName,
        actions: &[&WireguardAction],
        keys: &KeyRing,
    ) -> Vec<Result<(), Error>> {
        let family = match self.family() {
            Ok(family) => family,
            Err(error) => {
                let (reason, remedy) = (error.to_string(), error.remedy());
                let again = |_: &&WireguardAction| {
                    let object = format!("WireGuard device {interface}");
                    Err(Error::Unsupported { operation: "configure", object, reason: reason.clone(), remedy })
                };
                return actions.iter().map(again).collect();
            }
        };
        let mut results: Vec<Result<(), Error>> = Vec::with_capacity(actions.len());
        let mut requests = Vec::new();
        // Which change each request belongs to.
        let mut owners = Vec::new();
        for (index, action) in actions.iter().enumerate() {
            results.push(Ok(()));
            match messages(action, interface, keys) {
                Ok(all) => {
                    for attributes in all {
                        owners.push(index);
                        requests.push(Request {
                            operation: "configure",
                            object: format!("WireGuard device {interface} ({action})"),
                            flags: 0,
                            message: Message::set(family, interface, attributes),
                        });
                    }
                }
                Err(error) => results[index] = Err(error),
            }
        }
        for (owner, outcome) in owners.into_iter().zip(self.socket.batch(requests)) {
            if results[owner].is_ok() {
                results[owner] = outcome;
            }
        }
        results
    }
}

/// What the device is told for an action; each entry makes one message.
fn messages(
    action: &WireguardAction,
    interface: &InterfaceName,
    keys: &KeyRing,
) -> Result<Vec<WireguardAttribute>, Error> {
    Ok(match action {
        WireguardAction::SetPrivateKey { public_key } => {
            vec![WireguardAttribute::PrivateKey(*private_key(keys, public_key, interface)?.expose())]
        }
        WireguardAction::SetListenPort { listen_port } => vec![WireguardAttribute::ListenPort(*listen_port)],
        WireguardAction::ClearFirewallMark => vec![WireguardAttribute::Fwmark(0)],
        WireguardAction::AddPeer { public_key, peer } => add_peer(public_key, peer),
        WireguardAction::UpdatePeer { public_key, update } => {
            let mut attributes = Vec::new();
            if update.clear_preshared_key {
                attributes.push(WireguardPeerAttribute::PresharedKey([0; 32]));
            }
            attributes.extend(update.endpoint.map(WireguardPeerAttribute::Endpoint));
            attributes.extend(update.keepalive.map(WireguardPeerAttribute::PersistentKeepalive));
            let (add, remove): (Vec<Prefix>, Vec<Prefix>) = match &update.allowed_ips {
                Some(update) => (update.add.iter().copied().collect(), update.remove.iter().copied().collect()),
                None => (Vec::new(), Vec::new()),
            };
            let mut all = Vec::new();
            if !attributes.is_empty() || !add.is_empty() {
                all.extend(in_messages(public_key, WireguardPeerFlags::UpdateOnly, attributes, &add));
            }
            all.extend(remove.chunks(ALLOWED_IPS_PER_MESSAGE).map(discard));
            all
        }
        WireguardAction::RemovePeer { public_key } => {
            vec![WireguardAttribute::Peers(vec![record(public_key, WireguardPeerFlags::RemoveMe, Vec::new(), &[])])]
        }
    })
}

fn add_peer(public_key: &PublicKey, peer: &WireguardPeer) -> Vec<WireguardAttribute> {
    let mut attributes = vec![WireguardPeerAttribute::PersistentKeepalive(peer.keepalive)];
    attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
    let prefixes: Vec<Prefix> = peer.allowed_ips.iter().copied().collect();
    in_messages(public_key, WireguardPeerFlags::empty(), attributes, &prefixes)
}

/// A peer's attributes and prefixes, the latter spread over as many messages as they need.
fn in_messages(
    public_key: &PublicKey,
    flags: WireguardPeerFlags,
    attributes: Vec<WireguardPeerAttribute>,
    prefixes: &[Prefix],
) -> Vec<WireguardAttribute> {
    let (first, rest) = prefixes.split_at(prefixes.len().min(ALLOWED_IPS_PER_MESSAGE));
    let mut all = vec![WireguardAttribute::Peers(vec![record(public_key, flags, attributes, first)])];
    all.extend(rest.chunks(ALLOWED_IPS_PER_MESSAGE).map(|chunk| {
        // The first message has made the peer; if it is gone again, nobody wants it back.
        WireguardAttribute::Peers(vec![record(public_key, WireguardPeerFlags::UpdateOnly, Vec::new(), chunk)])
    }));
    all
}

/// Takes prefixes from whoever has them: a peer that nobody is gets them and goes.
fn discard(prefixes: &[Prefix]) -> WireguardAttribute {
    let nobody = nobody();
    WireguardAttribute::Peers(vec![
        record(&nobody, WireguardPeerFlags::empty(), Vec::new(), prefixes),
        record(&nobody, WireguardPeerFlags::RemoveMe, Vec::new(), &[]),
    ])
}

/// A public key that nobody has the private key of: a hash. The same everywhere, so that what a broken kernel might leave
/// behind of it is one peer that the next pass removes.
fn nobody() -> PublicKey {
    PublicKey::from_bytes(husk_overlay::digest::sha256(&["wireguard", "nobody"])).expect("the hash is not zero")
}

fn record(
    public_key: &PublicKey,
    flags: WireguardPeerFlags,
    attributes: Vec<WireguardPeerAttribute>,
    prefixes: &[Prefix],
) -> PeerRecord {
    let mut all = vec![WireguardPeerAttribute::PublicKey(*public_key.as_bytes())];
    if !flags.is_empty() {
        all.push(WireguardPeerAttribute::Flags(flags));
    }
    all.extend(attributes);
    if !prefixes.is_empty() {
        all.push(WireguardPeerAttribute::AllowedIps(prefixes.iter().map(allowed_ip).collect()));
    }
    PeerRecord(all)
}

fn allowed_ip(prefix: &Prefix) -> WireguardAllowedIp {
    let family = match prefix.family() {
        Family::Ipv4 => WireguardAddressFamily::Ipv4,
        Family::Ipv6 => WireguardAddressFamily::Ipv6,
    };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(prefix.address()),
        WireguardAllowedIpAttr::Cidr(prefix.length()),
    ])
}

/// A message of the family, wiped when dropped: requests carry private keys, answers private and preshared ones. Its `Debug`,
/// which the message types demand, shows nothing.
struct Message(GenlMessage<WireguardMessage>);

impl Message {
    fn new(family: u16, cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> Self {
        let mut message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        message.set_resolved_family_id(family);
        Self(message)
    }

    fn set(family: u16, interface: &InterfaceName, attribute: WireguardAttribute) -> Self {
        let name = WireguardAttribute::IfName(interface.to_string());
        Self::new(family, WireguardCmd::SetDevice, vec![name, attribute])
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WireGuard message")
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        for attribute in &mut self.0.payload.attributes {
            match attribute {
                WireguardAttribute::PrivateKey(key) => key.zeroize(),
                WireguardAttribute::Peers(peers) => {
                    for attribute in peers.iter_mut().flat_map(|peer| peer.0.iter_mut()) {
                        if let WireguardPeerAttribute::PresharedKey(key) = attribute {
                            key.zeroize();
                        }
                    }
                }
                _ => {}
            }
        }
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.0.message_type()
    }

    fn buffer_len(&self) -> usize {
        netlink_packet_core::Emitable::buffer_len(&self.0)
    }

    fn serialize(&self, buffer: &mut [u8]) {
        self.0.emit(buffer);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        GenlMessage::deserialize(header, payload).map(Self)
    }
}

impl From<Message> for NetlinkPayload<Message> {
    fn from(message: Message) -> Self {
        Self::InnerMessage(message)
    }
}

#[cfg(test)]
#[path = "kernel/tests.rs"]
mod tests;
