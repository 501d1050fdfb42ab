use std::os::unix::fs::PermissionsExt as _;

use husk_overlay::esp::{Aead, AssociationId};
use husk_overlay::keys::PublicKey;

use super::*;

const NOW: Duration = Duration::from_secs(1000);

fn config(mode: Mode) -> Config {
    let mut config = Config::new(vec!["10.64.0.0/10".parse().unwrap()]);
    config.mode = mode;
    config
}

struct Store {
    directory: tempfile::TempDir,
    config: Config,
}

impl Store {
    fn new(mode: Mode) -> Self {
        Self { directory: tempfile::tempdir().unwrap(), config: config(mode) }
    }

    /// As a daemon that starts.
    fn open(&self) -> KeyStore {
        KeyStore::open(self.directory.path(), &self.config).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join("keys").join(name)
    }

    fn names(&self) -> Vec<String> {
        names(&self.directory.path().join("keys")).unwrap().into_iter().collect()
    }
}

fn public(store: &mut KeyStore, epoch: u64) -> Option<PublicKey> {
    store.epochs(NOW).unwrap().get(&epoch).map(|own| own.public_key)
}

fn place(spi: u32) -> XfrmStateKey {
    XfrmStateKey { destination: "192.0.2.1".parse().unwrap(), spi }
}

fn spending(spi: u32, epoch: u64) -> (AssociationId, SpentAssociation) {
    (AssociationId(spi.into()), SpentAssociation { epoch, key: place(spi), stage: AssociationStage::Used })
}

fn begun(mode: Mode, epochs: &[u64]) -> (Store, KeyStore) {
    let folder = Store::new(mode);
    let mut store = folder.open();
    for epoch in epochs {
        store.begin(*epoch, NOW).unwrap();
    }
    (folder, store)
}

#[test]
fn a_key_is_kept_private_and_found_by_the_next_daemon() {
    for (mode, stem) in [(Mode::Wireguard, "wireguard"), (Mode::Ipsec, "esp"), (Mode::VxlanIpsec, "esp")] {
        let (folder, mut store) = begun(mode, &[4, 5]);
        let keys = store.epochs(NOW).unwrap();
        assert_eq!(keys.keys().copied().collect::<Vec<_>>(), [4, 5]);
        assert_ne!(keys[&4].public_key, keys[&5].public_key);
        assert_eq!(keys[&4].created, NOW);
        let later = NOW * 2;
        assert_eq!(folder.open().epochs(later).unwrap(), keys, "{mode}: with the time it was made and its salt");
        let ring = folder.open().ring(NOW).unwrap();
        assert!(keys.values().all(|own| ring.get(&own.public_key).is_some()));
        for name in folder.names() {
            assert_eq!(folder.path(&name).metadata().unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
        let directory = folder.path("").metadata().unwrap();
        assert_eq!(directory.permissions().mode() & 0o777, 0o700);
        assert!(folder.names().contains(&format!("{stem}-4.key")));
    }
}

#[test]
fn a_key_that_is_retired_leaves_nothing() {
    let (folder, mut store) = begun(Mode::Ipsec, &[1, 2]);
    // Another name of the same file shows what was in it when it went.
    std::fs::hard_link(folder.path("esp-1.key"), folder.directory.path().join("witness")).unwrap();
    store.retire(1).unwrap();
    store.retire(1).unwrap();
    assert_eq!(folder.names(), ["esp-2.json", "esp-2.key", "esp-2.spent"]);
    let witness = std::fs::read(folder.directory.path().join("witness")).unwrap();
    assert!(!witness.is_empty() && witness.iter().all(|byte| *byte == 0), "{witness:?}");
    assert_eq!(public(&mut store, 1), None);
    assert_eq!(folder.open().epochs(NOW).unwrap(), store.epochs(NOW).unwrap());
}

#[test]
fn a_broken_file_is_no_key_any_more() {
    for broken in [&[0xff, 0xfe][..], b"no key", &[b'A'; 300], b""] {
        let (folder, _) = begun(Mode::Wireguard, &[0]);
        std::fs::write(folder.path("wireguard-0.key"), broken).unwrap();
        let mut store = folder.open();
        assert_eq!(public(&mut store, 0), None);
        assert_eq!(folder.names(), [""; 0]);
        store.begin(0, NOW).unwrap();
        assert!(public(&mut store, 0).is_some());
    }
}

#[test]
fn a_key_is_read_once_and_goes_with_its_file() {
    let (folder, mut store) = begun(Mode::Wireguard, &[0]);
    let first = public(&mut store, 0);
    std::fs::write(folder.path("wireguard-0.key"), "half of a ke").unwrap();
    assert_eq!(public(&mut store, 0), first);
    std::fs::remove_file(folder.path("wireguard-0.key")).unwrap();
    assert_eq!(public(&mut store, 0), None);
    store.begin(0, NOW).unwrap();
    assert_ne!(public(&mut store, 0), first);
}

#[test]
fn a_file_that_cannot_be_read_is_no_reason_for_a_new_key() {
    for (mode, file) in [
        (Mode::Wireguard, "wireguard-0.key"),
        (Mode::Wireguard, "wireguard-0.json"),
        (Mode::Ipsec, "esp-0.key"),
        (Mode::Ipsec, "esp-0.json"),
        (Mode::Ipsec, "esp-0.spent"),
    ] {
        let (folder, _) = begun(mode, &[0]);
        std::fs::remove_file(folder.path(file)).unwrap();
        // Reading fails with ELOOP; replacing it would work.
        std::os::unix::fs::symlink(file, folder.path(file)).unwrap();
        let mut store = folder.open();
        let error = store.epochs(NOW).unwrap_err();
        assert!(format!("{error:#}").contains(file), "{error:#}");
        assert!(store.begin(1, NOW).is_err());
        assert!(folder.path(file).is_symlink());
        assert!(folder.path(&file.replace("json", "key").replace("spent", "key")).symlink_metadata().is_ok());
    }
}

#[test]
fn a_key_of_the_first_version_stays_that_of_the_device() {
    let folder = Store::new(Mode::Wireguard);
    let key = PrivateKey::from_random([7; 32]).unwrap();
    drop(folder.open());
    std::fs::write(folder.path("wireguard-0.key"), key.to_base64().as_bytes()).unwrap();
    let found = folder.open().epochs(NOW).unwrap();
    assert_eq!(found[&0].public_key, key.public());
    assert_eq!(folder.open().epochs(NOW * 5).unwrap()[&0].created, NOW, "from then on its age is known");
}

#[test]
fn keys_end_with_what_they_were_made_for() {
    type Change = fn(&mut Config);
    let psk = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(psk.path(), "0123456789abcdef").unwrap();
    let mut with_psk = config(Mode::Ipsec);
    with_psk.ipsec.preshared_key_file = Some(psk.path().to_owned());
    let changes: [(&str, Change); 6] = [
        ("mode", |config| config.mode = Mode::VxlanIpsec),
        ("cipher", |config| config.ipsec.cipher = Aead::AesGcm256),
        ("UDP port", |config| config.ipsec.udp_port = Some(4500)),
        ("replay window", |config| config.ipsec.replay_window = 8192),
        ("bits of an SPI", |config| config.ipsec.spi_bits = 8),
        ("technology", |config| config.mode = Mode::Wireguard),
    ];
    for (what, change) in changes {
        let (mut folder, _) = begun(Mode::Ipsec, &[1, 2]);
        assert_eq!(folder.open().epochs(NOW).unwrap().len(), 2, "{what}");
        change(&mut folder.config);
        assert_eq!(folder.open().epochs(NOW).unwrap().len(), 0, "{what}");
        assert_eq!(folder.names(), [""; 0], "{what}");
    }
    let (mut folder, _) = begun(Mode::Ipsec, &[1]);
    folder.config.ipsec.max_bytes = 1;
    folder.config.rotation.grace = 1;
    assert_eq!(folder.open().epochs(NOW).unwrap().len(), 1, "nothing that concerns associations");
    folder.config = with_psk.clone();
    assert_eq!(folder.open().epochs(NOW).unwrap().len(), 0, "a preshared key came");
    let mut store = folder.open();
    store.begin(2, NOW).unwrap();
    assert_eq!(folder.open().epochs(NOW).unwrap().len(), 1);
    std::fs::write(psk.path(), "0123456789abcdeg").unwrap();
    assert_eq!(folder.open().epochs(NOW).unwrap().len(), 0, "another preshared key");
}

#[test]
fn a_mode_without_keys_has_none() {
    let (mut folder, _) = begun(Mode::Wireguard, &[0]);
    folder.config.mode = Mode::Vxlan;
    let mut store = folder.open();
    assert_eq!(store.epochs(NOW).unwrap().len(), 0);
    assert!(store.begin(0, NOW).is_err());
    assert_eq!(folder.names(), [""; 0]);
}

#[test]
fn what_was_spent_goes_with_its_epoch() {
    let (folder, mut store) = begun(Mode::Ipsec, &[1, 2]);
    store.spend(&[spending(256, 1), spending(257, 2), spending(258, 2)].into()).unwrap();
    let again = |store: &mut KeyStore| {
        store.epochs(NOW).unwrap();
        store.spent().into_values().map(|spent| spent.key.spi).collect::<Vec<_>>()
    };
    assert_eq!(again(&mut folder.open()), [256, 257, 258]);
    store.take_back(&[place(258)].into()).unwrap();
    assert_eq!(again(&mut folder.open()), [256, 257]);
    store.retire(1).unwrap();
    assert_eq!((again(&mut store), again(&mut folder.open())), (vec![257], vec![257]));
    assert!(store.spend(&[spending(300, 9)].into()).is_err(), "of an epoch nobody holds");
}

#[test]
fn when_an_epoch_was_last_handed_out_is_remembered() {
    let (folder, mut store) = begun(Mode::Ipsec, &[1, 2]);
    assert_eq!(store.published(), BTreeMap::new());
    store.note_published(&[1].into(), NOW).unwrap();
    store.note_published(&[1].into(), NOW * 2).unwrap();
    store.note_published(&[2, 9].into(), NOW * 3).unwrap();
    let expected = BTreeMap::from([(1, NOW * 2), (2, NOW * 3)]);
    let mut next = folder.open();
    next.epochs(NOW * 4).unwrap();
    assert_eq!((store.published(), next.published()), (expected.clone(), expected));
    store.retire(1).unwrap();
    assert_eq!(store.published(), BTreeMap::from([(2, NOW * 3)]));
}

#[test]
fn an_end_is_written_down_before_what_takes_the_place() {
    let (folder, mut store) = begun(Mode::Ipsec, &[1, 2]);
    store.spend(&[spending(256, 2)].into()).unwrap();
    let (id, spent) = spending(256, 2);
    let ended = (id, SpentAssociation { stage: AssociationStage::Ended, ..spent });
    let heir = (AssociationId(1), SpentAssociation { epoch: 1, ..spent });
    // The file of the later epoch is the one that cannot be written.
    std::fs::remove_file(folder.path("esp-2.spent")).unwrap();
    std::fs::create_dir(folder.path("esp-2.spent")).unwrap();
    store.spend(&[ended, heir].into()).unwrap_err();
    assert_eq!(store.spent(), [spending(256, 2)].into(), "nothing has two associations");
    std::fs::remove_dir(folder.path("esp-2.spent")).unwrap();
    store.spend(&[ended, heir].into()).unwrap();
    assert_eq!(store.spent(), [ended, heir].into());
}

#[test]
fn an_epoch_of_which_nobody_knows_what_was_spent_is_over() {
    for (what, damage) in [("missing", None), ("garbage", Some("garbage\n"))] {
        let (folder, mut store) = begun(Mode::Ipsec, &[1, 2]);
        store.spend(&[spending(256, 1)].into()).unwrap();
        match damage {
            None => std::fs::remove_file(folder.path("esp-1.spent")).unwrap(),
            Some(text) => std::fs::write(folder.path("esp-1.spent"), text).unwrap(),
        }
        let epochs = folder.open().epochs(NOW).unwrap();
        assert_eq!(epochs.keys().copied().collect::<Vec<_>>(), [2], "{what}");
    }
}

#[test]
fn an_epoch_whose_beginning_was_interrupted_never_was() {
    let (folder, _) = begun(Mode::Ipsec, &[1]);
    let leftover = folder.path(&format!("{}0000-esp-2.key", files::TEMPORARY_PREFIX));
    std::fs::write(&leftover, "secret").unwrap();
    std::fs::write(folder.path("esp-2.spent"), "").unwrap();
    std::fs::write(folder.path("esp-2.json"), "{}").unwrap();
    assert_eq!(folder.open().epochs(NOW).unwrap().len(), 1);
    assert_eq!(folder.names(), ["esp-1.json", "esp-1.key", "esp-1.spent"]);
}

#[test]
fn an_epoch_is_made_once() {
    let (_folder, mut store) = begun(Mode::Ipsec, &[1]);
    let before = public(&mut store, 1);
    assert!(store.begin(1, NOW).unwrap_err().to_string().contains("already"));
    assert_eq!(public(&mut store, 1), before);
}

#[test]
fn keys_of_another_boot_are_discarded() {
    let (folder, _) = begun(Mode::Ipsec, &[1, 2]);
    discard(folder.directory.path()).unwrap();
    assert_eq!(folder.names(), [""; 0]);
    discard(&folder.directory.path().join("none")).unwrap();
}
