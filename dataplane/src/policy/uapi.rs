//! Numbers of nftables (include/uapi/linux/netfilter/nf_tables.h, unless another source is named), and of what `nft` writes
//! beside them.

/// `NFNL_SUBSYS_NFTABLES` (include/uapi/linux/netfilter/nfnetlink.h).
pub(super) const SUBSYSTEM: u8 = 10;

/// `NFPROTO_INET`, `NFPROTO_IPV4` and `NFPROTO_IPV6` (include/uapi/linux/netfilter.h).
pub(super) const NFPROTO_INET: u8 = 1;
pub(super) const NFPROTO_IPV4: u8 = 2;
pub(super) const NFPROTO_IPV6: u8 = 10;

// `enum nf_tables_msg_types`.
pub(super) const NFTA_TABLE_FLAGS: u16 = 2;
pub(super) const NFT_MSG_NEWTABLE: u16 = 0;
pub(super) const NFT_MSG_DELTABLE: u16 = 2;
pub(super) const NFT_MSG_NEWCHAIN: u16 = 3;
pub(super) const NFT_MSG_GETCHAIN: u16 = 4;
pub(super) const NFT_MSG_DELCHAIN: u16 = 5;
pub(super) const NFT_MSG_NEWRULE: u16 = 6;
pub(super) const NFT_MSG_GETRULE: u16 = 7;
pub(super) const NFT_MSG_DELRULE: u16 = 8;
pub(super) const NFT_MSG_NEWSET: u16 = 9;
pub(super) const NFT_MSG_GETSET: u16 = 10;
pub(super) const NFT_MSG_DELSET: u16 = 11;
pub(super) const NFT_MSG_NEWSETELEM: u16 = 12;
pub(super) const NFT_MSG_GETSETELEM: u16 = 13;
pub(super) const NFT_MSG_DELSETELEM: u16 = 14;
pub(super) const NFT_MSG_NEWOBJ: u16 = 18;
pub(super) const NFT_MSG_GETOBJ: u16 = 19;
pub(super) const NFT_MSG_DELOBJ: u16 = 20;
pub(super) const NFT_MSG_GETFLOWTABLE: u16 = 23;
pub(super) const NFT_MSG_DELFLOWTABLE: u16 = 24;

/// `NFTA_LIST_ELEM`.
pub(super) const NFTA_LIST_ELEM: u16 = 1;

/// The attribute in which tables, chains, rules, sets, lists of elements, objects and flow tables name their table alike.
pub(super) const NFTA_TABLE_NAME: u16 = 1;

pub(super) const NFTA_CHAIN_NAME: u16 = 3;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
pub(super) const NFTA_CHAIN_POLICY: u16 = 5;
pub(super) const NFTA_CHAIN_TYPE: u16 = 7;
pub(super) const NFTA_CHAIN_FLAGS: u16 = 10;
pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(super) const NFTA_HOOK_PRIORITY: u16 = 2;
pub(super) const NFT_CHAIN_BASE: u32 = 1;
pub(super) const NFT_CHAIN_BINDING: u32 = 4;

pub(super) const NFTA_RULE_CHAIN: u16 = 2;
pub(super) const NFTA_RULE_EXPRESSIONS: u16 = 4;
pub(super) const NFTA_RULE_USERDATA: u16 = 7;
/// `NFTNL_UDATA_RULE_COMMENT` (libnftnl include/libnftnl/udata.h): type, length, text with a final zero.
pub(super) const UDATA_RULE_COMMENT: u8 = 0;

pub(super) const NFTA_SET_TABLE: u16 = 1;
pub(super) const NFTA_SET_NAME: u16 = 2;
pub(super) const NFTA_SET_FLAGS: u16 = 3;
pub(super) const NFTA_SET_KEY_TYPE: u16 = 4;
pub(super) const NFTA_SET_KEY_LEN: u16 = 5;
pub(super) const NFTA_SET_DATA_TYPE: u16 = 6;
pub(super) const NFTA_SET_DATA_LEN: u16 = 7;
pub(super) const NFTA_SET_DESC: u16 = 9;
pub(super) const NFTA_SET_ID: u16 = 10;
pub(super) const NFTA_SET_USERDATA: u16 = 13;
pub(super) const NFTA_SET_DESC_CONCAT: u16 = 2;
pub(super) const NFTA_SET_FIELD_LEN: u16 = 1;
pub(super) const NFT_SET_ANONYMOUS: u32 = 0x1;
pub(super) const NFT_SET_INTERVAL: u32 = 0x4;
pub(super) const NFT_SET_MAP: u32 = 0x8;
pub(super) const NFT_SET_CONCAT: u32 = 0x80;
/// `NFT_DATA_VERDICT`.
pub(super) const NFT_DATA_VERDICT: u32 = 0xffff_ff00;
/// `NFTNL_UDATA_SET_KEYBYTEORDER`, `NFTNL_UDATA_SET_DATABYTEORDER` and `NFTNL_UDATA_SET_DATA_INTERVAL` (libnftnl
/// include/libnftnl/udata.h), and `BYTEORDER_HOST_ENDIAN` with `BYTEORDER_BIG_ENDIAN`
/// (nftables include/datatype.h).
pub(super) const UDATA_SET_KEYBYTEORDER: u8 = 0;
pub(super) const UDATA_SET_DATABYTEORDER: u8 = 1;
pub(super) const UDATA_SET_DATA_INTERVAL: u8 = 6;
pub(super) const BYTEORDER_HOST_ENDIAN: u32 = 1;
pub(super) const BYTEORDER_BIG_ENDIAN: u32 = 2;
/// `TYPE_IPADDR`, `TYPE_IP6ADDR`, `TYPE_INET_PROTOCOL`, `TYPE_INET_SERVICE`, `TYPE_MARK`, and `TYPE_BITS`, by which the types of a
/// concatenation are shifted (nftables include/datatype.h).
pub(super) const TYPE_IPADDR: u32 = 7;
pub(super) const TYPE_IP6ADDR: u32 = 8;
pub(super) const TYPE_INET_PROTOCOL: u32 = 12;
pub(super) const TYPE_INET_SERVICE: u32 = 13;
pub(super) const TYPE_MARK: u32 = 19;
pub(super) const TYPE_BITS: u32 = 6;

pub(super) const NFTA_SET_ELEM_LIST_SET: u16 = 2;
pub(super) const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
pub(super) const NFTA_SET_ELEM_KEY: u16 = 1;
pub(super) const NFTA_SET_ELEM_DATA: u16 = 2;
pub(super) const NFTA_SET_ELEM_FLAGS: u16 = 3;
pub(super) const NFTA_SET_ELEM_USERDATA: u16 = 6;
pub(super) const NFTA_SET_ELEM_PAD: u16 = 8;
pub(super) const NFTA_SET_ELEM_KEY_END: u16 = 10;
pub(super) const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

pub(super) const NFTA_DATA_VALUE: u16 = 1;
pub(super) const NFTA_DATA_VERDICT: u16 = 2;
pub(super) const NFTA_VERDICT_CODE: u16 = 1;
pub(super) const NFTA_VERDICT_CHAIN: u16 = 2;
/// `NF_DROP` and `NF_ACCEPT` (include/uapi/linux/netfilter.h), and those of `enum nft_verdicts`.
pub(super) const NF_DROP: i32 = 0;
pub(super) const NF_ACCEPT: i32 = 1;
pub(super) const NFT_JUMP: i32 = -3;
pub(super) const NFT_GOTO: i32 = -4;
pub(super) const NFT_RETURN: i32 = -5;

pub(super) const NFTA_OBJ_NAME: u16 = 2;
pub(super) const NFTA_OBJ_TYPE: u16 = 3;
pub(super) const NFTA_OBJ_DATA: u16 = 4;
pub(super) const NFT_OBJECT_COUNTER: u32 = 1;
pub(super) const NFTA_FLOWTABLE_NAME: u16 = 2;

pub(super) const NFTA_EXPR_NAME: u16 = 1;
pub(super) const NFTA_EXPR_DATA: u16 = 2;

/// Registers: that of the verdict, some of the sixteen of four octets, and those of sixteen octets, which are the same memory:
/// `NFT_REG_1` is `NFT_REG32_00` to `NFT_REG32_03`, and so on.
pub(super) const NFT_REG_VERDICT: u32 = 0;
pub(super) const NFT_REG_1: u32 = 1;
pub(super) const NFT_REG_2: u32 = 2;
pub(super) const NFT_REG_3: u32 = 3;
pub(super) const NFT_REG32_00: u32 = 8;
pub(super) const NFT_REG32_01: u32 = 9;
pub(super) const NFT_REG32_02: u32 = 10;
pub(super) const NFT_REG32_03: u32 = 11;
pub(super) const NFT_REG32_05: u32 = 13;

pub(super) const NFTA_META_DREG: u16 = 1;
pub(super) const NFTA_META_KEY: u16 = 2;
pub(super) const NFT_META_MARK: u32 = 3;
pub(super) const NFT_META_IIFNAME: u32 = 6;
pub(super) const NFT_META_OIFNAME: u32 = 7;
pub(super) const NFT_META_NFPROTO: u32 = 15;

pub(super) const NFTA_CMP_SREG: u16 = 1;
pub(super) const NFTA_CMP_OP: u16 = 2;
pub(super) const NFTA_CMP_DATA: u16 = 3;
pub(super) const NFT_CMP_EQ: u32 = 0;
pub(super) const NFT_CMP_NEQ: u32 = 1;

pub(super) const NFTA_BITWISE_SREG: u16 = 1;
pub(super) const NFTA_BITWISE_DREG: u16 = 2;
pub(super) const NFTA_BITWISE_LEN: u16 = 3;
pub(super) const NFTA_BITWISE_MASK: u16 = 4;
pub(super) const NFTA_BITWISE_XOR: u16 = 5;

pub(super) const NFTA_CT_DREG: u16 = 1;
pub(super) const NFTA_CT_KEY: u16 = 2;
pub(super) const NFTA_CT_DIRECTION: u16 = 3;
pub(super) const NFT_CT_STATE: u32 = 0;
pub(super) const NFT_CT_PROTOCOL: u32 = 10;
pub(super) const NFT_CT_PROTO_SRC: u32 = 11;
pub(super) const NFT_CT_SRC_IP: u32 = 19;
pub(super) const NFT_CT_SRC_IP6: u32 = 21;
/// `IP_CT_DIR_ORIGINAL` and `IP_CT_DIR_REPLY`, and `NF_CT_STATE_INVALID_BIT` with `NF_CT_STATE_UNTRACKED_BIT`
/// (include/uapi/linux/netfilter/nf_conntrack_common.h, nf_conntrack_tuple_common.h).
pub(super) const IP_CT_DIR_ORIGINAL: u8 = 0;
pub(super) const IP_CT_DIR_REPLY: u8 = 1;
pub(super) const STATE_INVALID_OR_UNTRACKED: u32 = 1 | 1 << 6;

pub(super) const NFTA_PAYLOAD_DREG: u16 = 1;
pub(super) const NFTA_PAYLOAD_BASE: u16 = 2;
pub(super) const NFTA_PAYLOAD_OFFSET: u16 = 3;
pub(super) const NFTA_PAYLOAD_LEN: u16 = 4;
pub(super) const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;

pub(super) const NFTA_LOOKUP_SET: u16 = 1;
pub(super) const NFTA_LOOKUP_SREG: u16 = 2;
pub(super) const NFTA_LOOKUP_DREG: u16 = 3;
pub(super) const NFTA_LOOKUP_FLAGS: u16 = 5;
pub(super) const NFT_LOOKUP_F_INV: u32 = 1;

pub(super) const NFTA_IMMEDIATE_DREG: u16 = 1;
pub(super) const NFTA_IMMEDIATE_DATA: u16 = 2;

pub(super) const NFTA_OBJREF_IMM_TYPE: u16 = 1;
pub(super) const NFTA_OBJREF_IMM_NAME: u16 = 2;

pub(super) const NFTA_LIMIT_RATE: u16 = 1;
pub(super) const NFTA_LIMIT_UNIT: u16 = 2;
pub(super) const NFTA_LIMIT_BURST: u16 = 3;
pub(super) const NFTA_LIMIT_TYPE: u16 = 4;
pub(super) const NFTA_LIMIT_FLAGS: u16 = 5;
pub(super) const NFT_LIMIT_PKTS: u32 = 0;

pub(super) const NFTA_LOG_GROUP: u16 = 1;
pub(super) const NFTA_LOG_PREFIX: u16 = 2;
pub(super) const NFTA_LOG_SNAPLEN: u16 = 3;
/// Longest prefix of a log message: `NF_LOG_PREFIXLEN` less a final zero (include/net/netfilter/nf_log.h).
pub(super) const MAX_LOG_PREFIX: usize = 127;
