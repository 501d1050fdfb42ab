//! Rules as the kernel runs them: expressions over registers (net/netfilter/nft_*.c), and the comment by which a rule is
//! recognised, since it cannot be read back as what it was made of.
//!
//! In a table of family `inet` the network header of a packet means nothing before its family is known: an address of the header
//! is loaded behind a comparison of the family. What connection tracking knows ends the rule by itself if the packet belongs to
//! no connection of that family.
//!
//! [`PolicyAction::Judge`] looks up a key whose first part is what another look-up found. `nft` prints no such rule: it takes what
//! a map holds for nothing, and gives up with an assertion (seen with 1.0.6, in `netlink_parse_concat_expr`), for everybody who
//! lists the ruleset of the host. It knows registers by their numbers alone, while the kernel has them in a row: so the register
//! of the class is loaded with the mark of the packet, which nft prints, and then overwritten from the register before it, by eight
//! octets at once, which nft does not notice. The comment of such a rule says what the mark stands for.

use husk_overlay::digest;
use husk_overlay::kernel::policy::{
    PolicyAction, PolicyClass, PolicyField, PolicyLog, PolicyMatch, PolicyRule, PolicyVerdict,
};
use husk_overlay::marks;
use husk_overlay::prefix::Family;

use super::uapi::*;
use crate::netfilter::Attributes;
use crate::nft::nfnetlink::name;

/// The comment that marks a rule as ours: `husk:` and the first 16 hexadecimal digits of SHA-256 over its expressions, and what
/// `nft` does not print of them.
pub(super) fn comment(rule: &PolicyRule) -> String {
    use std::fmt::Write as _;
    let expressions = expressions(rule);
    let text = expressions.bytes().iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    });
    let digest = digest::hex(&["policy-rule", &text]);
    let mut comment = format!("{}:{}", marks::NFT_TABLE, &digest[..16]);
    match &rule.action {
        PolicyAction::Judge { class: PolicyClass::Of(field, map), .. } => {
            let field = match field {
                PolicyField::Source(_) => "source",
                PolicyField::Destination(_) => "destination",
                PolicyField::Originator(_) => "originator",
                PolicyField::Responder(_) => "responder",
                PolicyField::OriginatorAndResponder(_) => "originator . responder",
            };
            let _ = write!(comment, " mark stands for {field} map @{map}");
        }
        PolicyAction::Judge { class: PolicyClass::Always(class), .. } => {
            let _ = write!(comment, " mark stands for {class:#010x}");
        }
        PolicyAction::Continue | PolicyAction::Verdict(_) | PolicyAction::Lookup(..) => {}
    }
    comment.truncate(comment.floor_char_boundary(MAX_COMMENT));
    comment
}

/// A list of expressions (`NFTA_RULE_EXPRESSIONS`).
pub(super) fn expressions(rule: &PolicyRule) -> Attributes {
    let mut program = Program::default();
    for it in &rule.matches {
        program.matches(it);
    }
    if let Some(counter) = &rule.counter {
        let data = numbers(&[(NFTA_OBJREF_IMM_TYPE, NFT_OBJECT_COUNTER)]);
        program.add("objref", &data.with(NFTA_OBJREF_IMM_NAME, &name(counter)));
    }
    if let Some(log) = &rule.log {
        program.log(log);
    }
    match &rule.action {
        PolicyAction::Continue => {}
        PolicyAction::Verdict(it) => {
            let data = numbers(&[(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT)]);
            program.add("immediate", &data.nest(NFTA_IMMEDIATE_DATA, &verdict(it)));
        }
        PolicyAction::Lookup(field, map) => {
            program.load(*field, Base::First);
            program.look_up(map, NFT_REG_1, NFT_REG_VERDICT);
        }
        PolicyAction::Judge { class, services } => program.judge(class, services),
    }
    program.expressions
}

/// A verdict as data (`enum nft_data_attributes`).
pub(super) fn verdict(verdict: &PolicyVerdict) -> Attributes {
    let (code, chain) = match verdict {
        PolicyVerdict::Accept => (NF_ACCEPT, None),
        PolicyVerdict::Drop => (NF_DROP, None),
        PolicyVerdict::Return => (NFT_RETURN, None),
        PolicyVerdict::Jump(chain) => (NFT_JUMP, Some(chain)),
        PolicyVerdict::Goto(chain) => (NFT_GOTO, Some(chain)),
    };
    let mut attributes = Attributes::default().with(NFTA_VERDICT_CODE, &code.to_be_bytes());
    if let Some(chain) = chain {
        attributes = attributes.with(NFTA_VERDICT_CHAIN, &name(chain));
    }
    Attributes::default().nest(NFTA_DATA_VERDICT, &attributes)
}

pub(super) fn numbers(all: &[(u16, u32)]) -> Attributes {
    with_numbers(Attributes::default(), all)
}

fn with_numbers(attributes: Attributes, all: &[(u16, u32)]) -> Attributes {
    all.iter().fold(attributes, |attributes, (kind, value)| attributes.with(*kind, &value.to_be_bytes()))
}

fn value(bytes: &[u8]) -> Attributes {
    Attributes::default().with(NFTA_DATA_VALUE, bytes)
}

/// Longest comment without its final zero (`NFTNL_UDATA_COMMENT_MAXLEN` in nftables include/rule.h).
const MAX_COMMENT: usize = 127;

/// The register of sixteen octets in which a field begins.
#[derive(Clone, Copy)]
enum Base {
    First,
    Second,
}

/// Expressions so far, and the family that packets have behind them.
#[derive(Default)]
struct Program {
    expressions: Attributes,
    family: Option<Family>,
}

impl Program {
    fn add(&mut self, kind: &str, data: &Attributes) {
        let expression = Attributes::default().with(NFTA_EXPR_NAME, &name(kind)).nest(NFTA_EXPR_DATA, data);
        self.expressions = std::mem::take(&mut self.expressions).nest(NFTA_LIST_ELEM, &expression);
    }

    fn matches(&mut self, it: &PolicyMatch) {
        match it {
            PolicyMatch::Family(family) => self.guard(*family),
            PolicyMatch::FromPod => self.pod(NFT_META_IIFNAME),
            PolicyMatch::ToPod => self.pod(NFT_META_OIFNAME),
            PolicyMatch::Stateless => {
                self.connection(NFT_CT_STATE, None, NFT_REG_1);
                let data =
                    numbers(&[(NFTA_BITWISE_SREG, NFT_REG_1), (NFTA_BITWISE_DREG, NFT_REG_1), (NFTA_BITWISE_LEN, 4)]);
                let data = data
                    .nest(NFTA_BITWISE_MASK, &value(&STATE_INVALID_OR_UNTRACKED.to_ne_bytes()))
                    .nest(NFTA_BITWISE_XOR, &value(&[0; 4]));
                self.add("bitwise", &data);
                self.compare(NFT_CMP_NEQ, &[0; 4]);
            }
            PolicyMatch::Below { rate, burst } => {
                let data = Attributes::default()
                    .with(NFTA_LIMIT_RATE, &rate.to_be_bytes())
                    .with(NFTA_LIMIT_UNIT, &1_u64.to_be_bytes());
                let data = with_numbers(
                    data,
                    &[(NFTA_LIMIT_BURST, *burst), (NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS), (NFTA_LIMIT_FLAGS, 0)],
                );
                self.add("limit", &data);
            }
            PolicyMatch::In(field, set) => self.is_in(*field, set, 0),
            PolicyMatch::NotIn(field, set) => self.is_in(*field, set, NFT_LOOKUP_F_INV),
        }
    }

    fn is_in(&mut self, field: PolicyField, set: &str, flags: u32) {
        self.load(field, Base::First);
        let data = Attributes::default().with(NFTA_LOOKUP_SET, &name(set));
        self.add("lookup", &with_numbers(data, &[(NFTA_LOOKUP_SREG, NFT_REG_1), (NFTA_LOOKUP_FLAGS, flags)]));
    }

    fn judge(&mut self, class: &PolicyClass, services: &str) {
        match class {
            PolicyClass::Of(field, map) => {
                self.load(*field, Base::Second);
                self.look_up(map, NFT_REG_2, NFT_REG_2);
                self.meta(NFT_META_MARK, NFT_REG32_03);
                self.meta(NFT_META_MARK, NFT_REG32_01);
                // The class is in the register behind the first of the two that are copied.
                let copy =
                    [(NFTA_BITWISE_SREG, NFT_REG32_03), (NFTA_BITWISE_DREG, NFT_REG32_00), (NFTA_BITWISE_LEN, 8)];
                let data = numbers(&copy).nest(NFTA_BITWISE_MASK, &value(&[0xff; 8]));
                self.add("bitwise", &data.nest(NFTA_BITWISE_XOR, &value(&[0; 8])));
            }
            PolicyClass::Always(class) => {
                self.meta(NFT_META_MARK, NFT_REG32_01);
                let data = numbers(&[(NFTA_IMMEDIATE_DREG, NFT_REG32_00)]);
                let both = [[0; 4], class.to_ne_bytes()].concat();
                self.add("immediate", &data.nest(NFTA_IMMEDIATE_DATA, &value(&both)));
            }
        }
        self.connection(NFT_CT_PROTOCOL, None, NFT_REG32_02);
        self.connection(NFT_CT_PROTO_SRC, Some(IP_CT_DIR_REPLY), NFT_REG32_03);
        self.look_up(services, NFT_REG32_01, NFT_REG_VERDICT);
    }

    /// Puts what a map has for the key in one register into another, or ends the rule.
    fn look_up(&mut self, map: &str, key: u32, found: u32) {
        let data = Attributes::default().with(NFTA_LOOKUP_SET, &name(map));
        self.add("lookup", &with_numbers(data, &[(NFTA_LOOKUP_SREG, key), (NFTA_LOOKUP_DREG, found)]));
    }

    /// Ends the rule for packets of the other family.
    fn guard(&mut self, family: Family) {
        if self.family != Some(family) {
            let number = match family {
                Family::Ipv4 => NFPROTO_IPV4,
                Family::Ipv6 => NFPROTO_IPV6,
            };
            self.meta(NFT_META_NFPROTO, NFT_REG_1);
            self.compare(NFT_CMP_EQ, &[number]);
            self.family = Some(family);
        }
    }

    /// The name of an interface begins with that of pods, and not with that of tunnels.
    fn pod(&mut self, key: u32) {
        self.meta(key, NFT_REG_1);
        self.compare(NFT_CMP_EQ, marks::INTERFACE_PREFIX.as_bytes());
        self.meta(key, NFT_REG_1);
        self.compare(NFT_CMP_NEQ, format!("{}-", marks::INTERFACE_PREFIX).as_bytes());
    }

    fn meta(&mut self, key: u32, register: u32) {
        self.add("meta", &numbers(&[(NFTA_META_DREG, register), (NFTA_META_KEY, key)]));
    }

    fn compare(&mut self, operator: u32, bytes: &[u8]) {
        let data = numbers(&[(NFTA_CMP_SREG, NFT_REG_1), (NFTA_CMP_OP, operator)]);
        self.add("cmp", &data.nest(NFTA_CMP_DATA, &value(bytes)));
    }

    fn connection(&mut self, key: u32, direction: Option<u8>, register: u32) {
        let mut data = numbers(&[(NFTA_CT_DREG, register), (NFTA_CT_KEY, key)]);
        if let Some(direction) = direction {
            data = data.with(NFTA_CT_DIRECTION, &[direction]);
        }
        self.add("ct", &data);
    }

    /// Loads a field into a register of sixteen octets and those behind it, as the keys of sets have it.
    fn load(&mut self, field: PolicyField, base: Base) {
        let address = |family| match family {
            Family::Ipv4 => NFT_CT_SRC_IP,
            Family::Ipv6 => NFT_CT_SRC_IP6,
        };
        let (first, second) = match (base, field.family()) {
            (Base::First, Family::Ipv4) => (NFT_REG_1, NFT_REG32_01),
            (Base::First, Family::Ipv6) => (NFT_REG_1, NFT_REG_2),
            (Base::Second, Family::Ipv4) => (NFT_REG_2, NFT_REG32_05),
            (Base::Second, Family::Ipv6) => (NFT_REG_2, NFT_REG_3),
        };
        match field {
            // Offsets and lengths: RFC 791 section 3.1, RFC 8200 section 3.
            PolicyField::Source(family @ Family::Ipv4) => self.header(family, (12, 4), first),
            PolicyField::Destination(family @ Family::Ipv4) => self.header(family, (16, 4), first),
            PolicyField::Source(family @ Family::Ipv6) => self.header(family, (8, 16), first),
            PolicyField::Destination(family @ Family::Ipv6) => self.header(family, (24, 16), first),
            PolicyField::Originator(family) => {
                self.connection(address(family), Some(IP_CT_DIR_ORIGINAL), first);
            }
            PolicyField::Responder(family) => self.connection(address(family), Some(IP_CT_DIR_REPLY), first),
            PolicyField::OriginatorAndResponder(family) => {
                self.connection(address(family), Some(IP_CT_DIR_ORIGINAL), first);
                self.connection(address(family), Some(IP_CT_DIR_REPLY), second);
            }
        }
    }

    fn header(&mut self, family: Family, (offset, length): (u32, u32), register: u32) {
        self.guard(family);
        let data = numbers(&[
            (NFTA_PAYLOAD_DREG, register),
            (NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER),
            (NFTA_PAYLOAD_OFFSET, offset),
            (NFTA_PAYLOAD_LEN, length),
        ]);
        self.add("payload", &data);
    }

    fn log(&mut self, log: &PolicyLog) {
        let mut end = log.prefix.len().min(MAX_LOG_PREFIX);
        while !log.prefix.is_char_boundary(end) {
            end -= 1;
        }
        let data = Attributes::default()
            .with(NFTA_LOG_GROUP, &log.group.to_be_bytes())
            .with(NFTA_LOG_PREFIX, &name(&log.prefix[..end]))
            .with(NFTA_LOG_SNAPLEN, &log.snap_length.to_be_bytes());
        self.add("log", &data);
    }
}
