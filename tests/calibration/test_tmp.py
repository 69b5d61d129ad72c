import torch, pytest
from dataclasses import replace
from hess_plugin.calibration import registration as r
import open3d
def test_x(make_room, predict, monkeypatch):
    room = make_room(views=2,height=72,width=96)
    orig=open3d.pipelines.registration.registration_ransac_based_on_feature_matching
    def spy(*a):
        f=orig(*a); print(len(a[0].points),len(a[1].points),f.fitness,f.inlier_rmse,len(f.correspondence_set), float(torch.linalg.det(torch.tensor(f.transformation)[:3,:3]))**(1/3)); return f
    monkeypatch.setattr(open3d.pipelines.registration,'registration_ransac_based_on_feature_matching',spy)
    from hess_plugin.calibration.alignment import align
    for seed in range(3):
        prediction, w = predict(room,seed=seed)
        for c in (room.cloud(), torch.randn(3000,3)**5, torch.randn(3000,3), torch.rand(3000,3)*4, predict(make_room(views=6))[1].apply(make_room(views=4).cloud())*torch.tensor([.3,1,2.])):
            try: a=align(prediction, replace(room,depth=None,points=c),seed=seed); p=prediction.points.detach().double(); print(a.method,(a.similarity.apply(p)-w.apply(p)).norm(dim=-1).median())
            except Exception as e: print(e)
