//! Security associations as messages.
//!
//! What is chosen for every one of them: extended sequence numbers (RFC 4304), since 32 bits are gone within minutes at
//! 10 Gbit/s; no limits, since who rotates keys is the plan and not the kernel; path MTU discovery as in RFC 4301 section
//! 8.1, which is the kernel's default: the outer header gets the "don't fragment" of the inner one; ECN as in RFC 6040 and
//! the outer DSCP taken from the inner header, both the kernel's defaults too.

use husk_overlay::esp::Aead;
use husk_overlay::kernel::{XfrmParameters, XfrmStateKey};
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::prefix::Family;

use super::message::{
    Builder, ESP, Message, XFRM_MSG_DELSA, XFRM_MSG_NEWSA, address_at, attributes, be16_at, be32_at, family_number,
    family_of, is_unlimited, u8_at, u16_at, u32_at, u64_at,
};
use super::model::ActualXfrmState;

/// `struct xfrm_usersa_info`: length, and where its fields are.
const INFO: usize = 224;
const SELECTOR_FAMILY: usize = 40;
const ID: usize = 56;
const ID_SPI: usize = ID + 16;
const ID_PROTOCOL: usize = ID + 20;
const SOURCE: usize = 80;
const LIFETIME: usize = 96;
const CURRENT_BYTES: usize = 160;
const CURRENT_PACKETS: usize = 168;
/// `integrity_failed` of `struct xfrm_stats`.
const UNDECRYPTABLE: usize = 200;
const REQID: usize = 208;
const FAMILY: usize = 212;
const MODE: usize = 214;
const FLAGS: usize = 216;

/// `struct xfrm_usersa_id`: length, and where its fields are.
const KEY: usize = 24;
const KEY_SPI: usize = 16;
const KEY_FAMILY: usize = 20;
const KEY_PROTOCOL: usize = 22;

const XFRMA_ALG_AUTH: u16 = 1;
const XFRMA_ALG_CRYPT: u16 = 2;
const XFRMA_ALG_COMP: u16 = 3;
const XFRMA_ENCAP: u16 = 4;
const XFRMA_COADDR: u16 = 14;
const XFRMA_ALG_AEAD: u16 = 18;
const XFRMA_ALG_AUTH_TRUNC: u16 = 20;
const XFRMA_MARK: u16 = 21;
const XFRMA_TFCPAD: u16 = 22;
const XFRMA_REPLAY_ESN_VAL: u16 = 23;
const XFRMA_SA_EXTRA_FLAGS: u16 = 24;
const XFRMA_OFFLOAD_DEV: u16 = 28;
const XFRMA_SET_MARK: u16 = 29;
const XFRMA_IF_ID: u16 = 31;

/// The selector is for both families: packets of either go through the tunnel, whatever the family around it.
const XFRM_STATE_AF_UNSPEC: u8 = 32;
const XFRM_STATE_ESN: u8 = 128;

const XFRM_MODE_TRANSPORT: u8 = 0;
const XFRM_MODE_TUNNEL: u8 = 1;

/// Name of AES-GCM for ESP in the kernel (net/xfrm/xfrm_algo.c), and `aead_name` of `struct xfrm_algo_aead`, 64 bytes.
pub(super) const AEAD: &str = "rfc4106(gcm(aes))";
const AEAD_NAME: usize = 64;
/// Length of the integrity check value in bits (RFC 4106, section 6).
const ICV_BITS: u32 = 128;

/// `UDP_ENCAP_ESPINUDP` (include/uapi/linux/udp.h): ESP in UDP as in RFC 3948.
pub(super) const ESP_IN_UDP: u16 = 2;

/// The request that installs an association with the given keying material.
pub(super) fn add(key: &XfrmStateKey, parameters: &XfrmParameters, secret: &[u8]) -> Message {
    let family = Family::of(key.destination);
    let mut info = Builder::new(INFO);
    info.put_address(ID, key.destination)
        .put(ID_SPI, &key.spi.to_be_bytes())
        .put(ID_PROTOCOL, &[ESP])
        .put_address(SOURCE, parameters.source)
        .put_unlimited(LIFETIME)
        .put(REQID, &marks::XFRM_REQID.to_ne_bytes())
        .put(FAMILY, &family_number(family).to_ne_bytes())
        .put(MODE, &[mode_number(parameters.mode)])
        .put(FLAGS, &[flags(parameters.mode)]);
    let mut name = [0; AEAD_NAME];
    name[..AEAD.len()].copy_from_slice(AEAD.as_bytes());
    let bits = key_bits(parameters.cipher).to_ne_bytes();
    info.attribute(XFRMA_ALG_AEAD, &[&name, &bits, &ICV_BITS.to_ne_bytes(), secret]);
    if let Some((source, destination)) = parameters.udp {
        // struct xfrm_encap_tmpl: type, ports, two bytes of padding, an original address that ESP has no use for.
        let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        info.attribute(XFRMA_ENCAP, &[&ESP_IN_UDP.to_ne_bytes(), &ports, &[0; 18]]);
    }
    // struct xfrm_replay_state_esn: words of the bitmap, four counters, the window; the kernel makes the bitmap.
    let words = parameters.replay_window.div_ceil(32).to_ne_bytes();
    info.attribute(XFRMA_REPLAY_ESN_VAL, &[&words, &[0; 16], &parameters.replay_window.to_ne_bytes()]);
    if parameters.if_id != 0 {
        info.attribute(XFRMA_IF_ID, &[&parameters.if_id.to_ne_bytes()]);
    }
    info.finish(XFRM_MSG_NEWSA)
}

/// The request that removes an association.
pub(super) fn remove(key: &XfrmStateKey) -> Message {
    let mut id = Builder::new(KEY);
    id.put_address(0, key.destination)
        .put(KEY_SPI, &key.spi.to_be_bytes())
        .put(KEY_FAMILY, &family_number(Family::of(key.destination)).to_ne_bytes())
        .put(KEY_PROTOCOL, &[ESP]);
    id.finish(XFRM_MSG_DELSA)
}

/// Reads an association: none when the message is too short, an inner none when it is not ours. One with SPI 0 is a note
/// the kernel makes to itself that somebody should negotiate one.
pub(super) fn parse(payload: &[u8]) -> Option<Option<(XfrmStateKey, ActualXfrmState)>> {
    let info = payload.get(..INFO)?;
    let spi = be32_at(info, ID_SPI)?;
    let Some(family) = family_of(u16_at(info, FAMILY)?) else { return Some(None) };
    if u32_at(info, REQID)? != marks::XFRM_REQID || u8_at(info, ID_PROTOCOL)? != ESP || spi == 0 {
        return Some(None);
    }
    let key = XfrmStateKey { destination: address_at(info, ID, family)?, spi };
    let found = ActualXfrmState {
        parameters: parameters(payload, family),
        source: address_at(info, SOURCE, family)?,
        packets: u64_at(info, CURRENT_PACKETS)?,
        bytes: u64_at(info, CURRENT_BYTES)?,
        undecryptable: u32_at(info, UNDECRYPTABLE)?,
    };
    Some(Some((key, found)))
}

/// What it is; none if Husk would not have set it up like that. Attributes that are not known here do not count: a newer
/// kernel may say more about every association.
fn parameters(payload: &[u8], family: Family) -> Option<XfrmParameters> {
    let info = payload.get(..INFO)?;
    let mode = match u8_at(info, MODE)? {
        XFRM_MODE_TUNNEL => EspMode::Tunnel,
        XFRM_MODE_TRANSPORT => EspMode::Transport,
        _ => return None,
    };
    // An association for some packets only, or of one family inside the tunnel, one that ends by itself, or one with another
    // way of counting.
    let inner = family_of(u16_at(info, SELECTOR_FAMILY)?);
    let everything = inner == (mode == EspMode::Transport).then_some(family)
        && info[..SELECTOR_FAMILY].iter().chain(&info[SELECTOR_FAMILY + 2..ID]).all(|byte| *byte == 0);
    if !everything || !is_unlimited(info, LIFETIME)? || u8_at(info, FLAGS)? != flags(mode) {
        return None;
    }
    let (mut cipher, mut replay_window, mut udp, mut if_id) = (None, None, None, 0);
    for (kind, value) in attributes(payload, INFO) {
        match kind {
            XFRMA_ALG_AEAD => cipher = Some(parse_cipher(value)?),
            XFRMA_REPLAY_ESN_VAL => replay_window = Some(parse_window(value)?),
            XFRMA_ENCAP if u16_at(value, 0)? == ESP_IN_UDP => udp = Some((be16_at(value, 2)?, be16_at(value, 4)?)),
            XFRMA_IF_ID => if_id = u32_at(value, 0)?,
            XFRMA_SA_EXTRA_FLAGS if value.iter().all(|byte| *byte == 0) => {}
            XFRMA_ALG_AUTH | XFRMA_ALG_CRYPT | XFRMA_ALG_COMP | XFRMA_ENCAP | XFRMA_COADDR | XFRMA_ALG_AUTH_TRUNC
            | XFRMA_MARK | XFRMA_TFCPAD | XFRMA_SA_EXTRA_FLAGS | XFRMA_OFFLOAD_DEV | XFRMA_SET_MARK => return None,
            _ => {}
        }
    }
    let source = address_at(info, SOURCE, family)?;
    Some(XfrmParameters { source, mode, if_id, cipher: cipher?, replay_window: replay_window?, udp })
}

fn parse_cipher(value: &[u8]) -> Option<Aead> {
    let name = value.get(..AEAD_NAME)?;
    let named = name.starts_with(AEAD.as_bytes()) && name[AEAD.len()..].iter().all(|byte| *byte == 0);
    if !named || u32_at(value, AEAD_NAME + 4)? != ICV_BITS {
        return None;
    }
    let bits = u32_at(value, AEAD_NAME)?;
    Aead::ALL.into_iter().find(|cipher| key_bits(*cipher) == bits)
}

fn parse_window(value: &[u8]) -> Option<u32> {
    let (words, window) = (u32_at(value, 0)?, u32_at(value, 20)?);
    (words == window.div_ceil(32)).then_some(window)
}

fn key_bits(cipher: Aead) -> u32 {
    8 * u32::try_from(cipher.key_length()).expect("keys have some tens of bytes")
}

pub(super) fn mode_number(mode: EspMode) -> u8 {
    match mode {
        EspMode::Tunnel => XFRM_MODE_TUNNEL,
        EspMode::Transport => XFRM_MODE_TRANSPORT,
    }
}

/// In transport mode there is no packet inside that could be of another family.
fn flags(mode: EspMode) -> u8 {
    match mode {
        EspMode::Tunnel => XFRM_STATE_ESN | XFRM_STATE_AF_UNSPEC,
        EspMode::Transport => XFRM_STATE_ESN,
    }
}

#[cfg(test)]
#[path = "states_tests.rs"]
mod tests;
