//! Modes `ipsec` and `vxlan-ipsec`: associations, and the policies that make packets use them.
//!
//! ```text
//!                 ipsec: ESP in tunnel mode                     vxlan-ipsec: VXLAN in ESP transport mode
//! route           peer's blocks → xfrm interface                as in mode vxlan, to peers that can be sent to
//! policy out      any → block: by one association, by its SPI   own → peer, VXLAN's port: likewise
//! policy in, fwd  block → any: by any association of the peer   peer → own, VXLAN's port: likewise (in only)
//! without policy  the xfrm interface drops                      VXLAN's port is blocked in both directions
//! ```
//! A policy that names an SPI is what moves packets from one association to the next, at one stroke
//! (`xfrm_state_find` in net/xfrm/xfrm_state.c compares the template's SPI). It names one only after it was read back from
//! the kernel; until then it names the one before. Receiving is not so particular: whatever is installed is good.
//!
//! [`pair`] knows the associations with one peer, [`epochs`] the own keys; [`crate::rotation`] why all this loses no packet.

mod epochs;
mod pair;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use self::epochs::{Epochs, published};
use self::pair::{Choice, Own, Pair, Slot, claim};
use super::local::{route_key, router_on};
use super::peers::Peer;
use super::{Context, vxlan};
use crate::esp::AssociationId;
use crate::facts::{AssociationStage, EspFacts, SpentAssociation};
use crate::issue::{Issue, IssueKind, Severity};
use crate::kernel::{
    Desired, Link, LinkKind, Route, RouteTarget, XfrmAction, XfrmDirection, XfrmParameters, XfrmPolicy, XfrmPolicyKey,
    XfrmState, XfrmStateKey, XfrmTemplate,
};
use crate::marks;
use crate::mode::Mode;
use crate::mtu::EspMode;
use crate::name::{InterfaceName, NodeName};
use crate::prefix::{Family, Prefix};
use crate::record::{EspEpochRecord, EspRecord};
use crate::rotation::Rotation;

/// Priority of the policies that protect: before those that block.
pub const PROTECT_PRIORITY: u32 = 1000;

/// Most epochs a node publishes.
const MOST_EPOCHS: usize = 2;

pub(super) fn render(
    context: &Context<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
    issues: &mut Vec<Issue>,
) -> (Rotation, Option<EspRecord>) {
    let Some(esp) = supported(context, issues) else { return Default::default() };
    let (Some(address), false) = (context.own_underlay(), super::name_taken(context.snapshot, context.facts)) else {
        return Default::default();
    };
    let own = Own {
        node: &context.facts.node,
        address,
        cipher: context.config.ipsec.cipher,
        spi_bits: context.config.ipsec.spi_bits,
        esp,
        holders: holders(esp),
    };
    let mut pairs = pairs(context, &own, peers, issues);
    let numbers: Vec<u64> = esp.epochs.keys().copied().collect();
    // What collides is known before anything is published.
    claim(&mut pairs, &numbers, &BTreeSet::new());
    let published = published(esp, &pairs);
    claim(&mut pairs, &numbers, &published);
    let choices: Vec<Choice> = pairs.iter().map(|pair| pair.choose(&published)).collect();
    for (pair, choice) in pairs.iter_mut().zip(&choices) {
        // Packets may be under way through those that are no longer named.
        let numbered = pair.outbound.iter_mut().enumerate();
        numbered.for_each(|(index, slot)| {
            slot.desired = choice.target == Some(index) || slot.standing.usage().is_some();
        });
    }
    let spend = install(context, &own, &pairs, &choices, desired);
    for (pair, choice) in pairs.iter().zip(&choices) {
        if let Some(peer) = peers.get_mut(&pair.name) {
            peer.plan.port = pair.udp_port;
            peer.plan.keys = pair.keys(*choice, &published);
            let keys = &peer.plan.keys;
            let used = pair.epochs.iter().find(|epoch| Some(epoch.epoch) == keys.peer);
            peer.plan.public_key = used.map(|epoch| epoch.public_key);
        }
    }
    match context.config.mode {
        Mode::VxlanIpsec => {
            let can_send = |peer: &Peer| peer.plan.keys.own.is_some();
            vxlan::render(context, peers, can_send, desired, issues);
            block_vxlan(context, desired);
        }
        _ => tunnel(context, peers, desired),
    }
    protect(context, &own, &pairs, &choices, peers, desired);
    let recorded = context.snapshot.nodes.get(&context.facts.node).and_then(|record| record.esp.as_ref());
    let decision = Epochs {
        config: context.config,
        facts: context.facts,
        esp,
        recorded: recorded.and_then(|record| record.epochs.iter().map(|epoch| epoch.epoch).max()),
        published: &published,
        pairs: &pairs,
        choices: &choices,
    }
    .decide();
    let record = record(context, esp, &published);
    let epochs::Decision { actions, unconfirmed, waiting } = decision;
    (Rotation { actions, published, spend, unconfirmed, waiting }, Some(record))
}

/// What is known of ESP; none, with an issue, if the kernel cannot do it. There is no plaintext in its place.
fn supported<'a>(context: &Context<'a>, issues: &mut Vec<Issue>) -> Option<&'a EspFacts> {
    let (message, remedy) = match &context.facts.esp {
        Some(EspFacts { unavailable: None, .. }) => return context.facts.esp.as_ref(),
        Some(EspFacts { unavailable: Some(reason), .. }) => (
            format!("the kernel cannot do ESP as this mode needs it: {reason}"),
            "use a kernel with ESP, AES-GCM and the xfrm interface, or choose mode wireguard on all nodes",
        ),
        None => ("it is not known yet whether the kernel can do ESP".to_owned(), "wait for the daemon's next pass"),
    };
    issues.push(Issue {
        severity: Severity::Blocking,
        kind: IssueKind::EncapsulationUnavailable,
        subject: format!("mode {}", context.config.mode),
        message,
        remedy: remedy.to_owned(),
    });
    None
}

/// Associations with all peers that agree on what ESP looks like; the others are refused.
fn pairs(
    context: &Context<'_>,
    own: &Own<'_>,
    peers: &mut BTreeMap<NodeName, Peer>,
    issues: &mut Vec<Issue>,
) -> Vec<Pair> {
    let mut pairs = Vec::with_capacity(peers.len());
    for (name, peer) in peers.iter_mut().filter(|(_, peer)| peer.plan.refused.is_none()) {
        let Some(address) = peer.plan.address else { continue };
        match disagreement(context, peer.record.esp.as_ref()) {
            Some((message, remedy)) => peer.refuse(issues, IssueKind::IncompletePeer, message, remedy.to_owned()),
            None => pairs.extend(peer.record.esp.as_ref().map(|record| Pair::new(own, name, address, record))),
        }
    }
    pairs
}

/// Why there can be no association with a peer, and what to do about it.
fn disagreement(context: &Context<'_>, record: Option<&EspRecord>) -> Option<(String, &'static str)> {
    let ours = &context.config.ipsec;
    let Some(theirs) = record else {
        return Some(("the node publishes no ESP keys".into(), "use the same mode on all nodes"));
    };
    let with = |udp: bool| if udp { "with UDP encapsulation" } else { "without UDP encapsulation" };
    let encapsulated = (theirs.udp_port.is_some(), ours.udp_port.is_some());
    let ascending = theirs.epochs.windows(2).all(|two| two[0].epoch < two[1].epoch);
    if theirs.cipher != ours.cipher {
        let message = format!("the node uses the cipher {}, this one {}", theirs.cipher, ours.cipher);
        Some((message, "set ipsec.cipher to the same value on all nodes"))
    } else if encapsulated.0 != encapsulated.1 {
        let message = format!("the node sends ESP {}, this one {}", with(encapsulated.0), with(encapsulated.1));
        Some((message, "set ipsec.udpEncapsulation on all nodes or on none"))
    } else if theirs.epochs.len() > MOST_EPOCHS || !ascending {
        let message =
            format!("the node publishes {} epochs, and at most two, oldest first, make sense", theirs.epochs.len());
        Some((message, "restart the node's daemon"))
    } else if theirs.epochs.iter().any(|epoch| epoch.public_key.is_small_order()) {
        let message = "the node publishes a public key that would give no secret".to_owned();
        Some((message, "restart the node's daemon; if that does not help, look who writes its record"))
    } else {
        None
    }
}

/// Which association has, or had last, a place in the kernel.
fn holders(esp: &EspFacts) -> HashMap<XfrmStateKey, AssociationId> {
    esp.spent
        .iter()
        .filter(|(_, spent)| spent.stage != AssociationStage::Ended)
        .map(|(id, spent)| (spent.key, *id))
        .collect()
}

/// The associations, and what has to be written down of them.
fn install(
    context: &Context<'_>,
    own: &Own<'_>,
    pairs: &[Pair],
    choices: &[Choice],
    desired: &mut Desired,
) -> BTreeMap<AssociationId, SpentAssociation> {
    let ours = context.config.ipsec.udp_port;
    let mut spend = BTreeMap::new();
    for (pair, choice) in pairs.iter().zip(choices) {
        let named = choice.named.map(|index| pair.outbound[index].id);
        let inbound = pair.inbound.iter().map(|slot| (slot, pair.udp_port.zip(ours), true));
        let outbound = pair.outbound.iter().map(|slot| (slot, ours.zip(pair.udp_port), Some(slot.id) == named));
        for (slot, udp, used) in inbound.chain(outbound).filter(|(slot, ..)| slot.desired) {
            let stage = if used { AssociationStage::Used } else { AssociationStage::Unused };
            if own.esp.spent.get(&slot.id).is_none_or(|known| known.stage < stage) {
                spend.insert(slot.id, SpentAssociation { epoch: slot.own, key: slot.key, stage });
            }
            if let Some(holder) = own.holders.get(&slot.key).filter(|holder| **holder != slot.id) {
                let ended = own
                    .esp
                    .spent
                    .get(holder)
                    .map(|spent| SpentAssociation { stage: AssociationStage::Ended, ..*spent });
                spend.extend(ended.map(|ended| (*holder, ended)));
            }
            desired.xfrm_states.insert(slot.key, state(context, slot, udp));
        }
    }
    spend
}

fn state(context: &Context<'_>, slot: &Slot, udp: Option<(u16, u16)>) -> XfrmState {
    let parameters = XfrmParameters {
        source: slot.association.sender.address,
        mode: esp_mode(context),
        if_id: if_id(context),
        cipher: slot.association.cipher,
        replay_window: context.config.ipsec.replay_window,
        udp,
    };
    let fresh = slot.standing.usage().is_none();
    XfrmState { parameters, association: slot.association.clone(), fresh }
}

fn esp_mode(context: &Context<'_>) -> EspMode {
    if context.config.mode.uses_vxlan() { EspMode::Transport } else { EspMode::Tunnel }
}

fn if_id(context: &Context<'_>) -> u32 {
    if context.config.mode.uses_vxlan() { 0 } else { marks::XFRM_IF_ID }
}

/// Mode `ipsec`: the xfrm interface, and a route per block of a peer that can be sent to.
fn tunnel(context: &Context<'_>, peers: &BTreeMap<NodeName, Peer>, desired: &mut Desired) {
    let Some(mtu) = context.inner_mtu else { return };
    let interface = InterfaceName::new(marks::XFRM_INTERFACE).expect("a constant of ten letters and a dash");
    // No threaded NAPI: what comes out of the interface was received by the underlay's.
    let kind = LinkKind::Xfrm { if_id: marks::XFRM_IF_ID };
    desired.links.insert(interface.clone(), Link { kind, mtu, mac: None, threaded_napi: false });
    router_on(context, &interface, desired);
    for peer in peers.values().filter(|peer| peer.plan.refused.is_none() && peer.plan.keys.own.is_some()) {
        for block in &peer.record.blocks {
            let target = RouteTarget::Interface { interface: interface.clone(), via: None, onlink: false };
            let source = context.router.get(block.family());
            desired.routes.insert(route_key(*block), Route { target, source, mtu: peer.mtu() });
        }
    }
}

/// Policies of both modes, for peers that were not refused meanwhile.
fn protect(
    context: &Context<'_>,
    own: &Own<'_>,
    pairs: &[Pair],
    choices: &[Choice],
    peers: &BTreeMap<NodeName, Peer>,
    desired: &mut Desired,
) {
    let mode = esp_mode(context);
    let mut policies = Vec::new();
    for (pair, choice) in pairs.iter().zip(choices) {
        let Some(peer) = peers.get(&pair.name).filter(|peer| peer.plan.refused.is_none()) else { continue };
        let here = own.address;
        if let Some(named) = choice.named.map(|index| &pair.outbound[index]) {
            let template = XfrmTemplate { source: here, destination: pair.address, mode, spi: Some(named.key.spi) };
            policies.extend(selectors(context, peer, here, XfrmDirection::Out).map(|key| (key, template)));
        }
        if pair.inbound.iter().any(|slot| slot.desired) {
            let template = XfrmTemplate { source: pair.address, destination: here, mode, spi: None };
            policies.extend(selectors(context, peer, here, XfrmDirection::In).map(|key| (key, template)));
            if mode == EspMode::Tunnel {
                policies.extend(selectors(context, peer, here, XfrmDirection::Forward).map(|key| (key, template)));
            }
        }
    }
    let policy = |template| XfrmPolicy { priority: PROTECT_PRIORITY, action: XfrmAction::Protect(template) };
    desired.xfrm_policies.extend(policies.into_iter().map(|(key, template)| (key, policy(template))));
}

/// Which packets between this node and a peer a policy is for: in tunnel mode what carries addresses of the peer's blocks, in
/// transport mode VXLAN between the two underlay addresses.
fn selectors(
    context: &Context<'_>,
    peer: &Peer,
    here: IpAddr,
    direction: XfrmDirection,
) -> impl Iterator<Item = XfrmPolicyKey> {
    let (if_id, vxlan) = (if_id(context), context.config.mode.uses_vxlan());
    let udp_port = vxlan.then_some(context.config.vxlan.port);
    let both: Vec<(Prefix, Prefix)> = if vxlan {
        peer.plan.address.map(|there| (Prefix::host(here), Prefix::host(there))).into_iter().collect()
    } else {
        peer.record.blocks.iter().map(|block| (Prefix::default_route(block.family()), *block)).collect()
    };
    both.into_iter().map(move |(ours, theirs)| {
        let (source, destination) = if direction == XfrmDirection::Out { (ours, theirs) } else { (theirs, ours) };
        XfrmPolicyKey { direction, source, destination, udp_port, if_id }
    })
}

/// Mode `vxlan-ipsec`: VXLAN that no other policy protects is dropped, to whomever and from whomever.
fn block_vxlan(context: &Context<'_>, desired: &mut Desired) {
    let family: Family = context.config.underlay.family;
    for direction in [XfrmDirection::In, XfrmDirection::Out] {
        let key = XfrmPolicyKey {
            direction,
            source: Prefix::default_route(family),
            destination: Prefix::default_route(family),
            udp_port: Some(context.config.vxlan.port),
            if_id: 0,
        };
        let policy = XfrmPolicy { priority: marks::XFRM_BLOCK_PRIORITY, action: XfrmAction::Block };
        desired.xfrm_policies.insert(key, policy);
    }
}

fn record(context: &Context<'_>, esp: &EspFacts, published: &BTreeSet<u64>) -> EspRecord {
    let epochs = esp.epochs.iter().filter(|(epoch, _)| published.contains(epoch));
    let mut epochs: Vec<EspEpochRecord> = epochs
        .map(|(epoch, own)| EspEpochRecord { epoch: *epoch, public_key: own.public_key, spi_salt: own.spi_salt })
        .collect();
    epochs.drain(..epochs.len().saturating_sub(MOST_EPOCHS));
    EspRecord { cipher: context.config.ipsec.cipher, udp_port: context.config.ipsec.udp_port, epochs }
}

#[cfg(test)]
mod tests;
