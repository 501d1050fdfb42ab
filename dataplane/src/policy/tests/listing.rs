//! What is written is read back, by Husk and by `nft`.

use super::*;

#[test]
fn a_table_of_every_feature_round_trips() {
    in_namespace(|| {
        assert_eq!(read().unwrap(), None);
        assert!(read_counters().unwrap().is_empty());
        let table = everything();
        let changes = converge(&table);
        assert_eq!(texts(&changes), ["create with 6 chains, 13 sets with 21 elements"]);
        let listing = listing();
        println!("{listing}");
        let mut live = Live::default();
        let delete = diff(None, live.read().unwrap().as_deref());
        assert_eq!(texts(&delete), ["delete"]);
        live.apply(&delete, None).unwrap();
        assert_eq!((live.read().unwrap(), read().unwrap()), (None, None));
    });
}
