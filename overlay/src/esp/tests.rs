//! Test vectors, which `vectors.py` computed from the definition, and the properties the definition is for.

use std::collections::BTreeSet;

use super::*;

/// What `vectors.py` prints for one association.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Vector {
    association: Association,
    sender_private: String,
    receiver_private: String,
    preshared: Option<String>,
    key: String,
    salt: u64,
    bits: u8,
    spi: u32,
}

fn hex(text: &str) -> Vec<u8> {
    let digit = |byte: u8| u8::try_from(char::from(byte).to_digit(16).unwrap()).unwrap();
    text.as_bytes().chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

fn private(text: &str) -> PrivateKey {
    PrivateKey::from_random(hex(text).try_into().unwrap()).unwrap()
}

/// Key material, which has no comparison and no `Debug` of its own.
fn bytes(key: Result<EspKey, KeyError>) -> Vec<u8> {
    key.map(|key| key.expose().to_vec()).unwrap()
}

fn error(key: Result<EspKey, KeyError>) -> KeyError {
    key.map(|_| "a key").unwrap_err()
}

fn own(byte: u8) -> PrivateKey {
    PrivateKey::from_random([byte; 32]).unwrap()
}

fn end(node: &str, epoch: u64, address: &str, key: u8) -> EspEnd {
    EspEnd { node: node.parse().unwrap(), epoch, address: address.parse().unwrap(), public_key: own(key).public() }
}

fn association() -> Association {
    Association {
        sender: end("node-a", 3, "192.0.2.1", 1),
        receiver: end("node-b", 5, "192.0.2.2", 2),
        cipher: Aead::AesGcm256,
    }
}

#[test]
fn keys_and_spis_are_those_of_an_independent_implementation() {
    let vectors: Vec<Vector> = serde_json::from_str(include_str!("vectors.json")).unwrap();
    let mut kinds = BTreeSet::new();
    for vector in vectors {
        let it = &vector.association;
        kinds.insert((it.sender.address.is_ipv4(), it.cipher, vector.preshared.is_some()));
        let preshared = vector.preshared.as_deref().map(|text| PresharedKey::new(hex(text)));
        for end in [&vector.sender_private, &vector.receiver_private] {
            assert_eq!(bytes(derive(it, &private(end), preshared.as_ref())), hex(&vector.key), "{it:?}");
        }
        assert_eq!(vector.key.len(), it.cipher.key_length() * 2);
        assert_eq!(spi(it, vector.salt, vector.bits), vector.spi, "{it:?} {} {}", vector.salt, vector.bits);
    }
    assert_eq!(kinds.len(), 8, "both families and ciphers, with and without a preshared key");
}

#[test]
fn whatever_differs_gives_another_key_and_another_spi() {
    type Change = (&'static str, fn(&mut Association));
    let changes: [Change; 14] = [
        ("nothing", |_| {}),
        ("direction", |it| std::mem::swap(&mut it.sender, &mut it.receiver)),
        ("direction of epochs", |it| std::mem::swap(&mut it.sender.epoch, &mut it.receiver.epoch)),
        ("direction of names", |it| std::mem::swap(&mut it.sender.node, &mut it.receiver.node)),
        ("sender's name", |it| it.sender.node = "node-c".parse().unwrap()),
        ("receiver's name", |it| it.receiver.node = "node-c".parse().unwrap()),
        ("where one name ends", |it| it.sender.node = "node-aa".parse().unwrap()),
        ("sender's epoch", |it| it.sender.epoch = 4),
        ("receiver's epoch", |it| it.receiver.epoch = 6),
        ("sender's address", |it| it.sender.address = "192.0.2.3".parse().unwrap()),
        ("receiver's address", |it| it.receiver.address = "::ffff:192.0.2.2".parse().unwrap()),
        ("sender's key", |it| it.sender.public_key = own(3).public()),
        ("receiver's key", |it| it.receiver.public_key = own(4).public()),
        ("cipher", |it| it.cipher = Aead::AesGcm128),
    ];
    let (mut keys, mut spis) = (BTreeSet::new(), BTreeSet::new());
    for (what, change) in changes {
        let mut it = association();
        change(&mut it);
        // One end holds the key of its side whatever the other side's is.
        let holder = if it.sender.public_key == own(3).public() { own(2) } else { own(1) };
        // A longer key could begin with the shorter one.
        assert!(keys.insert(bytes(derive(&it, &holder, None))[..16].to_vec()), "{what}: the same key");
        assert!(spis.insert(spi(&it, 0, 32)), "{what}: the same SPI");
    }
    for preshared in [&b"one"[..], b"other"] {
        let key = derive(&association(), &own(1), Some(&PresharedKey::new(preshared.to_vec())));
        assert!(keys.insert(bytes(key)[..16].to_vec()), "{preshared:?}");
    }
    assert!(spis.insert(spi(&association(), 1, 32)), "the salt");
}

#[test]
fn both_ends_derive_one_key() {
    let it = association();
    for preshared in [None, Some(PresharedKey::new(b"secret".to_vec()))] {
        let of = |byte| bytes(derive(&it, &own(byte), preshared.as_ref()));
        assert_eq!(of(1), of(2));
        assert_eq!(of(1).len(), 36);
    }
}

#[test]
fn a_key_that_belongs_to_neither_end_is_refused() {
    assert_eq!(error(derive(&association(), &own(3), None)), KeyError::Foreign);
}

/// The points of small order and their other encodings (RFC 7748, section 6.1; there are no more below 2^255).
#[test]
fn public_keys_of_small_order_are_refused() {
    let order_eight = [
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    ];
    let around_the_prime = ["ec", "ed", "ee"].map(|low| format!("{low}{}7f", "ff".repeat(30)));
    let one = format!("01{}", "00".repeat(31));
    let all = order_eight.into_iter().map(str::to_owned).chain(around_the_prime).chain([one]);
    for text in all {
        let mut point: [u8; 32] = hex(&text).try_into().unwrap();
        // X25519 ignores the highest bit.
        for high in [0, 0x80] {
            point[31] = (point[31] & 0x7f) | high;
            let mut it = association();
            it.receiver.public_key = PublicKey::from_bytes(point).unwrap();
            assert_eq!(error(derive(&it, &own(1), None)), KeyError::SmallOrder, "{text} {high}");
            std::mem::swap(&mut it.sender, &mut it.receiver);
            assert_eq!(error(derive(&it, &own(1), None)), KeyError::SmallOrder, "{text} {high}");
        }
    }
}

#[test]
fn spis_are_never_reserved_and_use_as_many_bits_as_asked() {
    for (bits, span) in
        [(0, 1), (8, 256), (9, 512), (16, 1 << 16), (31, 1 << 31), (32, u32::MAX - 255), (200, u32::MAX - 255)]
    {
        for salt in 0..500 {
            let spi = spi(&association(), salt, bits);
            assert!((256..=255 + span).contains(&spi), "{bits} bits: {spi}");
        }
    }
    let few: BTreeSet<u32> = (0..4096).map(|salt| spi(&association(), salt, 8)).collect();
    assert_eq!(few, (256..512).collect(), "all values of 8 bits occur");
}

/// Not a proof of anything, but what is left of a hash when some of it is lost fails it.
#[test]
fn spis_spread_over_all_values() {
    let spis: Vec<u32> = (0..8192).map(|salt| spi(&association(), salt, 32)).collect();
    assert_eq!(spis.iter().collect::<BTreeSet<_>>().len(), spis.len());
    for bit in 0..32 {
        let set = spis.iter().filter(|spi| **spi >> bit & 1 == 1).count();
        assert!((3800..4400).contains(&set), "bit {bit} is set in {set} of 8192");
    }
}

#[test]
fn a_fingerprint_tells_secrets_apart_and_depends_on_the_node() {
    let of = |secret: &str, node: u8| PresharedKey::new(secret.as_bytes().to_vec()).fingerprint(&own(node));
    assert_eq!(of("a", 1), of("a", 1));
    assert_ne!(of("a", 1), of("b", 1));
    assert_ne!(of("a", 1), of("a", 2));
}

/// Compiles only if the type implements none of the traits: if it does, two implementations fit `_`.
macro_rules! assert_lacks {
    ($type:ty: $($name:path),+) => {$(
        const _: fn() = || {
            trait Ambiguous<A> {
                fn item() {}
            }
            struct Implements;
            impl<T: ?Sized> Ambiguous<()> for T {}
            impl<T: ?Sized + $name> Ambiguous<Implements> for T {}
            let _ = <$type as Ambiguous<_>>::item;
        };
    )+};
}

// Who could print, copy or serialise a secret would one day do it.
assert_lacks!(PrivateKey: fmt::Debug, fmt::Display, Serialize, Clone, PartialEq);
assert_lacks!(PresharedKey: fmt::Debug, fmt::Display, Serialize, Clone, PartialEq);
assert_lacks!(EspKey: fmt::Debug, fmt::Display, Serialize, Clone, PartialEq);
