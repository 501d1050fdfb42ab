//! Policies as messages.

use husk_overlay::kernel::{XfrmAction, XfrmDirection, XfrmPolicy, XfrmPolicyKey, XfrmTemplate};
use husk_overlay::marks;
use husk_overlay::mtu::EspMode;
use husk_overlay::prefix::{Family, Prefix};

use super::message::{
    Builder, ESP, Message, SELECTOR, XFRM_MSG_DELPOLICY, address_at, address_bytes, attributes, be16_at, be32_at,
    family_number, family_of, is_unlimited, u8_at, u16_at, u32_at,
};
use super::model::ActualXfrmPolicy;
use super::states::mode_number;

/// `struct xfrm_selector`: where its fields are.
const DESTINATION: usize = 0;
const SOURCE: usize = 16;
const DESTINATION_PORT: usize = 32;
const DESTINATION_PORT_MASK: usize = 34;
const SOURCE_PORT: usize = 36;
const SELECTOR_FAMILY: usize = 40;
const DESTINATION_LENGTH: usize = 42;
const SOURCE_LENGTH: usize = 43;
const PROTOCOL: usize = 44;
/// `ifindex` and `user`, which no policy of ours uses, to the end.
const INTERFACE: usize = 48;

/// `struct xfrm_userpolicy_info`: length, and where its fields are.
const INFO: usize = 168;
const LIFETIME: usize = SELECTOR;
const PRIORITY: usize = 152;
const DIRECTION: usize = 160;
const ACTION: usize = 161;
const FLAGS: usize = 162;

/// `struct xfrm_userpolicy_id`: length, and where the direction is.
const ID: usize = 64;
const ID_DIRECTION: usize = 60;

/// `struct xfrm_user_tmpl`: length, and where its fields are.
const TEMPLATE: usize = 64;
const TEMPLATE_SPI: usize = 16;
const TEMPLATE_PROTOCOL: usize = 20;
const TEMPLATE_FAMILY: usize = 24;
const TEMPLATE_SOURCE: usize = 28;
const TEMPLATE_REQID: usize = 44;
const TEMPLATE_MODE: usize = 48;
/// Three masks of algorithms; all bits set mean any, which AEAD needs, having no bit.
const TEMPLATE_ALGORITHMS: usize = 52;

const XFRMA_TMPL: u16 = 5;
const XFRMA_POLICY_TYPE: u16 = 16;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;

const XFRM_POLICY_ALLOW: u8 = 0;
const XFRM_POLICY_BLOCK: u8 = 1;

/// `IPPROTO_UDP`.
const UDP: u8 = 17;

/// The request that makes a policy: `XFRM_MSG_NEWPOLICY` refuses if there is one for the same packets, `XFRM_MSG_UPDPOLICY`
/// replaces it in one step (net/xfrm/xfrm_policy.c `xfrm_policy_insert`).
pub(super) fn set(kind: u16, key: &XfrmPolicyKey, policy: &XfrmPolicy) -> Message {
    let mut info = Builder::new(INFO);
    let action = match policy.action {
        XfrmAction::Protect(_) => XFRM_POLICY_ALLOW,
        XfrmAction::Block => XFRM_POLICY_BLOCK,
    };
    info.put(0, &selector(key))
        .put_unlimited(LIFETIME)
        .put(PRIORITY, &policy.priority.to_ne_bytes())
        .put(DIRECTION, &[direction_number(key.direction)])
        .put(ACTION, &[action]);
    if let XfrmAction::Protect(template) = &policy.action {
        info.attribute(XFRMA_TMPL, &[&template_bytes(template)]);
    }
    put_if_id(&mut info, key);
    info.finish(kind)
}

/// The request that removes a policy.
pub(super) fn remove(key: &XfrmPolicyKey) -> Message {
    let mut id = Builder::new(ID);
    id.put(0, &selector(key)).put(ID_DIRECTION, &[direction_number(key.direction)]);
    put_if_id(&mut id, key);
    id.finish(XFRM_MSG_DELPOLICY)
}

fn put_if_id(request: &mut Builder, key: &XfrmPolicyKey) {
    if key.if_id != 0 {
        request.attribute(XFRMA_IF_ID, &[&key.if_id.to_ne_bytes()]);
    }
}

/// `XFRM_POLICY_IN`, `_OUT` and `_FWD`.
fn direction_number(direction: XfrmDirection) -> u8 {
    match direction {
        XfrmDirection::In => 0,
        XfrmDirection::Out => 1,
        XfrmDirection::Forward => 2,
    }
}

fn selector(key: &XfrmPolicyKey) -> [u8; SELECTOR] {
    let mut bytes = [0; SELECTOR];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(DESTINATION, &address_bytes(key.destination.address()));
    put(SOURCE, &address_bytes(key.source.address()));
    put(SELECTOR_FAMILY, &family_number(key.destination.family()).to_ne_bytes());
    put(DESTINATION_LENGTH, &[key.destination.length()]);
    put(SOURCE_LENGTH, &[key.source.length()]);
    if let Some(port) = key.udp_port {
        put(DESTINATION_PORT, &port.to_be_bytes());
        put(DESTINATION_PORT_MASK, &u16::MAX.to_be_bytes());
        put(PROTOCOL, &[UDP]);
    }
    bytes
}

fn template_bytes(template: &XfrmTemplate) -> [u8; TEMPLATE] {
    let mut bytes = [0; TEMPLATE];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &address_bytes(template.destination));
    put(TEMPLATE_SPI, &template.spi.unwrap_or(0).to_be_bytes());
    put(TEMPLATE_PROTOCOL, &[ESP]);
    put(TEMPLATE_FAMILY, &family_number(Family::of(template.destination)).to_ne_bytes());
    put(TEMPLATE_SOURCE, &address_bytes(template.source));
    put(TEMPLATE_REQID, &marks::XFRM_REQID.to_ne_bytes());
    put(TEMPLATE_MODE, &[mode_number(template.mode)]);
    put(TEMPLATE_ALGORITHMS, &[0xff; 12]);
    bytes
}

/// Reads a policy: none when the message is too short, an inner none when it is not ours.
pub(super) fn parse(payload: &[u8]) -> Option<Option<(XfrmPolicyKey, ActualXfrmPolicy)>> {
    let info = payload.get(..INFO)?;
    let (mut templates, mut if_id, mut plain) = (&[][..], 0, true);
    for (kind, value) in attributes(payload, INFO) {
        match kind {
            XFRMA_TMPL => templates = value,
            XFRMA_IF_ID => if_id = u32_at(value, 0)?,
            // A policy for marked packets only, or one of another set of policies: there may be one like ours beside it.
            XFRMA_MARK => plain = false,
            XFRMA_POLICY_TYPE => plain &= u8_at(value, 0)? == 0,
            _ => {}
        }
    }
    let priority = u32_at(info, PRIORITY)?;
    let blocks = u8_at(info, ACTION)? == XFRM_POLICY_BLOCK;
    let ours = if templates.is_empty() {
        blocks && priority == marks::XFRM_BLOCK_PRIORITY
    } else {
        templates.chunks(TEMPLATE).any(|template| u32_at(template, TEMPLATE_REQID) == Some(marks::XFRM_REQID))
    };
    if !ours {
        return Some(None);
    }
    let Some(key) = parse_key(info, if_id).filter(|_| plain) else {
        tracing::debug!("a policy with our marks is for packets that Husk has no policies for: left alone");
        return Some(None);
    };
    let action = match blocks {
        true => templates.is_empty().then_some(XfrmAction::Block),
        false => parse_template(templates).map(XfrmAction::Protect),
    };
    let usual = is_unlimited(info, LIFETIME)? && u8_at(info, FLAGS)? == 0;
    Some(Some((key, action.filter(|_| usual).map(|action| XfrmPolicy { priority, action }))))
}

/// Which packets it is for; none for a choice that [`XfrmPolicyKey`] cannot express.
fn parse_key(info: &[u8], if_id: u32) -> Option<XfrmPolicyKey> {
    let family = family_of(u16_at(info, SELECTOR_FAMILY)?)?;
    let direction = [XfrmDirection::In, XfrmDirection::Out, XfrmDirection::Forward]
        .into_iter()
        .find(|direction| Some(direction_number(*direction)) == u8_at(info, DIRECTION))?;
    let port = be16_at(info, DESTINATION_PORT)?;
    let udp_port = match (u8_at(info, PROTOCOL)?, be16_at(info, DESTINATION_PORT_MASK)?) {
        (0, 0) => None,
        (UDP, u16::MAX) => Some(port),
        _ => return None,
    };
    let unused = |range: std::ops::Range<usize>| info[range].iter().all(|byte| *byte == 0);
    if !unused(SOURCE_PORT..SELECTOR_FAMILY) || !unused(INTERFACE..SELECTOR) {
        return None;
    }
    let prefix = |at, length| Prefix::containing(address_at(info, at, family)?, u8_at(info, length)?).ok();
    let key = XfrmPolicyKey {
        direction,
        source: prefix(SOURCE, SOURCE_LENGTH)?,
        destination: prefix(DESTINATION, DESTINATION_LENGTH)?,
        udp_port,
        if_id,
    };
    // The kernel finds a policy by the bytes of its selector: one with bits behind the prefix is not found by ours.
    (selector(&key) == info[..SELECTOR]).then_some(key)
}

/// The one template of a policy of ours; none if it is another.
fn parse_template(bytes: &[u8]) -> Option<XfrmTemplate> {
    let family = family_of(u16_at(bytes, TEMPLATE_FAMILY)?)?;
    let mode = [EspMode::Tunnel, EspMode::Transport]
        .into_iter()
        .find(|mode| Some(mode_number(*mode)) == u8_at(bytes, TEMPLATE_MODE))?;
    let spi = be32_at(bytes, TEMPLATE_SPI)?;
    let template = XfrmTemplate {
        source: address_at(bytes, TEMPLATE_SOURCE, family)?,
        destination: address_at(bytes, 0, family)?,
        mode,
        spi: (spi != 0).then_some(spi),
    };
    // Optional protection, other algorithms, a second template: whatever is not exactly what would be written.
    (template_bytes(&template)[..] == *bytes).then_some(template)
}

#[cfg(test)]
#[path = "policies_tests.rs"]
mod tests;
